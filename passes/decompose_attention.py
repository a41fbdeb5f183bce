"""Open `scaled_dot_product_attention` into scale, product, mask, softmax, product: the softmax must be seen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import is_tensor, shape_of
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
            scale = shape_of(arguments["query"])[-1] ** -0.5
        replace(node, _open(Writer(node), arguments, scale))
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


def _open(call: Writer, arguments: dict[str, Any], scale: Any) -> Node:
    query, key, value = (arguments[name] for name in PARAMETERS[:3])
    scores = call(torch.matmul, call(torch.mul, query, scale), call(torch.transpose, key, -2, -1))
    mask = arguments.get("attn_mask")
    if is_tensor(mask):  # a function in the graph may return None
        scores = call(add_mask, scores, mask)
    return call(torch.matmul, call(F.softmax, scores, dim=-1), value)


def add_mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return masked scores: a boolean mask keeps where it is true, a float mask is added."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask
