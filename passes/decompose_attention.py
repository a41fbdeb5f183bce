"""Open `scaled_dot_product_attention` into scale, product, mask, softmax, product: the softmax must be seen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta
from ptq4vit_fx.passes.graph.stages import Stage

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@graph_pass(before=Stage.TRACED, after=Stage.TRACED)
def decompose_attention(graph_module: GraphModule) -> int:
    """Rewrite every fused attention in the order in which timm's ViT computes it unfused.

    The result is bit-equal to the same timm ViT with `fused_attn=False`. Needs recorded shapes: the default scale is
    1 / sqrt(last dimension of the query). Raises PTQError on causal masks, grouped queries and active
    dropout, which no vision transformer of timm uses.
    """
    found = [node for node in graph_module.graph.nodes if node.target is F.scaled_dot_product_attention]
    for node in found:
        arguments = dict(zip(PARAMETERS, node.args, strict=False)) | node.kwargs
        for name in ("dropout_p", "is_causal", "enable_gqa"):
            if arguments.get(name):
                raise failure(
                    "pass decompose_attention",
                    f"node {node.name}",
                    expected=f"no {name}",
                    got=f"{name}={arguments[name]}",
                    do="write this attention out with matmul and softmax in the model",
                )
        scale = arguments.get("scale")
        if scale is None:
            scale = arguments["query"].meta["tensor_meta"].shape[-1] ** -0.5
        with graph_module.graph.inserting_before(node):
            result = _open(graph_module.graph, node, arguments, scale)
        node.replace_all_uses_with(result)
        graph_module.graph.erase_node(node)
    if found:
        _reshape_views(graph_module.graph)
    return len(found)


def _reshape_views(graph: Graph) -> None:
    """Let `view` copy where it must: fused kernels return (batch, tokens, heads, dim) in memory, products do not."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _open(graph: Graph, fused: Node, arguments: dict[str, Any], scale: Any) -> Node:
    def call(function: Any, *args: Any, **kwargs: Any) -> Node:
        return adopt_meta(graph.call_function(function, args, kwargs), fused)

    query, key, value = (arguments[name] for name in PARAMETERS[:3])
    scores = call(torch.matmul, call(torch.mul, query, scale), call(torch.transpose, key, -2, -1))
    mask = arguments.get("attn_mask")
    if mask is not None and "tensor_meta" in mask.meta:  # a function in the graph may return None
        scores = call(add_mask, scores, mask)
    return call(torch.matmul, call(F.softmax, scores, dim=-1), value)


def add_mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return masked scores: a boolean mask keeps where it is true, a float mask is added."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask
