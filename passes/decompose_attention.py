"""Open `scaled_dot_product_attention` into scale, product, mask, softmax, product: the softmax must be seen."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import call_name, get_attribute, is_stored, stored_path
from ptq4vit_fx.passes.graph.marks import scope_of
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import RESULT, is_tensor, shape_of
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.product_forms import form_of

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@graph_pass(before=Stage.TRACED, after=Stage.TRACED)
def decompose_attention(graph_module: GraphModule) -> int:
    """Rewrite every fused attention in the order in which timm's ViT computes it unfused.

    The result is bit-equal to the same timm ViT with `fused_attn=False`. Needs recorded shapes: the default scale is
    1 / sqrt(last dimension of the query). A row whose keys are all masked gives 0, as the fused one does. Raises
    PTQError on dropout, which the fused one does in evaluation too.
    """
    found = [node for node in graph_module.graph.nodes if node.target is F.scaled_dot_product_attention]
    for node in found:
        arguments = dict(zip(PARAMETERS, node.args, strict=False)) | node.kwargs
        if arguments.get("dropout_p"):
            raise failure(
                "prepare_fx",
                f"scaled_dot_product_attention in {scope_of(node) or 'the model'}",
                expected="no dropout in evaluation mode",
                got=f"dropout_p={arguments['dropout_p']}, which it drops out in either mode",
                do="pass dropout_p=... if self.training else 0.0",
            )
        replace(node, _open(graph_module, Writer(node), arguments))
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


def _open(graph_module: GraphModule, call: Writer, arguments: dict[str, Any]) -> Node:
    query, key, value = (arguments[name] for name in PARAMETERS[:3])
    scale = arguments.get("scale")
    if scale is None:
        scale = shape_of(query)[-1] ** -0.5
    if arguments.get("enable_gqa"):
        key, value = (_as_many_heads(call, x, query) for x in (key, value))
    scores = call(torch.matmul, call(torch.mul, query, scale), call(torch.transpose, key, -2, -1))
    mask, masked = arguments.get("attn_mask"), None
    if arguments.get("is_causal"):
        mask = _causal_mask(graph_module, call, shape_of(query)[-2], shape_of(arguments["key"])[-2])
        scores = call(add_mask, scores, mask)
    elif is_tensor(mask):  # a function in the graph may return None
        scores = call(add_mask, scores, mask)
        if _may_mask_a_row(graph_module, mask):
            masked = call(rows_without_keys, mask)
            scores = call(torch.masked_fill, scores, masked, 0.0)  # the softmax of -inf alone is NaN
    result = call(torch.matmul, call(F.softmax, scores, dim=-1), value)
    return result if masked is None else call(torch.masked_fill, result, masked, 0.0)


def _as_many_heads(call: Writer, x: Node, query: Node) -> Node:
    """Repeat the heads of keys or values that several queries share."""
    return call(torch.repeat_interleave, x, shape_of(query)[-3] // shape_of(x)[-3], -3)


def _causal_mask(graph_module: GraphModule, call: Writer, queries: int, keys: int) -> Node:
    device = next((p.device for p in graph_module.parameters()), torch.device("cpu"))
    keep = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    (mask,) = call.within(f"{call.place.name}_causal").hold({"mask": keep})
    return mask


def add_mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return masked scores: a boolean mask keeps where it is true, a float mask is added."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask


def rows_without_keys(mask: torch.Tensor) -> torch.Tensor:
    """Return where a mask (..., queries, keys) leaves no key: (..., queries, 1), boolean."""
    if mask.dtype == torch.bool:
        return ~mask.any(-1, keepdim=True)
    return (mask == float("-inf")).all(-1, keepdim=True)


def _may_mask_a_row(graph_module: GraphModule, mask: Node) -> bool:
    """Return whether a row may lose all of its keys: what is finite, or constant and never does, needs no care.

    Constant is also what depends on the sizes of inputs alone.
    """
    sources = _sources(mask)
    if not any(node.op == "placeholder" or _is_computed(node) for node in sources):
        interpreter = Interpreter(graph_module, garbage_collect_values=False)
        values = interpreter.env
        with torch.no_grad():
            for node in graph_module.graph.nodes:
                if node in sources:
                    values[node] = node.meta[RESULT] if _is_size(node) else interpreter.run_node(node)
        return bool(rows_without_keys(values[mask]).any())
    if mask.meta[RESULT].dtype == torch.bool:
        return True
    return any(_may_be_infinite(graph_module, node) for node in sources)


def _sources(node: Node) -> set[Node]:
    """Return the nodes that a value is made of, down to parameters, inputs, and layers, whose results are finite."""
    found, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        is_end = _is_computed(current) or _is_size(current)
        operands = [] if is_end else [n for n in current.all_input_nodes if n not in found]
        found.update(operands)
        waiting += operands
    return found


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get(RESULT), (int, torch.Size))


def _is_computed(node: Node) -> bool:
    return node.op == "call_module" or form_of(node.target) is not None


def _may_be_infinite(graph_module: GraphModule, node: Node) -> bool:
    """Return whether -inf comes into a mask here: written so, stored, made by a logarithm, or given by the caller."""
    if is_stored(node):
        return bool(torch.isneginf(get_attribute(graph_module, stored_path(node))).any())
    is_written = any(isinstance(x, float) and x == -math.inf for x in tree_leaves((node.args, node.kwargs)))
    is_given = node.op == "placeholder" and node.prev.op != "root"  # the first input is the image
    return is_written or is_given or call_name(node).startswith("log")
