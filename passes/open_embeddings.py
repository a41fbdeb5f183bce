"""Write bags of embeddings as rows of a table and their sum, mean or maximum; shorten rows that `max_norm` limits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import call_name, is_stored, origin
from ptq4vit_fx.passes.graph.rewriter import Writer, owner, replace
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.stages import Stage

aten = torch.ops.aten
#: What pools a bag, in the order of torch's numbers for it.
POOLS: dict[str, Callable[..., Any]] = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}
#: Operators that give four results, of which the first one is the bags.
OPERATORS = (torch.embedding_bag, aten.embedding_bag.default, aten.embedding_bag.padding_idx)
#: What the operators' arguments are called in F.embedding_bag, in their order.
ARGUMENTS = (
    *("weight", "input", "offsets", "scale_grad_by_freq", "mode", "sparse"),
    *("per_sample_weights", "include_last_offset", "padding_idx"),
)


@graph_pass(before=Stage.TRACED, after=Stage.TRACED)
def open_embeddings(graph_module: GraphModule) -> int:
    """Rewrite embedding_bag on bags of one length, and embeddings with `max_norm`. Needs recorded shapes.

    Left alone are bags of different lengths, which ONNX has no operator for: the export refuses them. `max_norm` makes
    torch shorten rows of the table where they are first read; here all of them are, once.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        count += _shorten_behind(node) if node.target is aten.embedding_renorm_.default else _open(node)
    return count


def _open(node: Node) -> bool:
    """Rewrite a node if it is one of these; return whether it was."""
    call = embedding_call(node)
    if call is None:
        return False
    ids, weight, max_norm = call["input"], call["weight"], call["max_norm"]
    is_bag = "mode" in call
    rows = _rows(node, call) if is_bag else ids
    if rows is None or (max_norm is None and not is_bag):
        return False
    write = Writer(node)
    weight = write.attribute(weight) if isinstance(weight, str) else weight
    if max_norm is not None:
        weight = write(torch.renorm, weight, float(call["norm_type"]), 0, float(max_norm))
    found = write(F.embedding, rows, weight)
    if not is_bag:
        replace(node, found)
        return True
    result = _pooled(write, found, rows, call)
    for reader in list(node.users) if node.target in OPERATORS else [node]:
        replace(reader, result)
    if node.target in OPERATORS:
        node.graph.erase_node(node)
    return True


def embedding_call(node: Node) -> dict[str, Any] | None:
    """Return the arguments of F.embedding or F.embedding_bag, in whichever spelling, by name; None for other calls.

    weight: the path of the table where a module holds it.
    """
    if node.op == "call_module":
        return _of_module(node, owner(node).get_submodule(str(node.target)))
    if node.target in (F.embedding, F.embedding_bag):
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    if node.target in OPERATORS:
        given: dict[str, Any] = dict(zip(ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
        call = {"per_sample_weights": None, "padding_idx": None, "include_last_offset": False, "max_norm": None} | given
        return call | {"mode": list(POOLS)[given.get("mode", 0)]}
    return None


def _of_module(node: Node, module: nn.Module) -> dict[str, Any] | None:
    if type(module) not in (nn.Embedding, nn.EmbeddingBag):
        return None
    bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    names = ("max_norm", "norm_type", "padding_idx", "mode", "include_last_offset")
    settings = {name: getattr(module, name) for name in names if hasattr(module, name)}
    return {"weight": f"{node.target}.weight"} | settings | bound.arguments


def _rows(node: Node, call: dict[str, Any]) -> Node | None:
    """Return ids (bags, length), None where lengths differ; `per_sample_weights` gets the same shape."""
    ids, offsets, weights = call["input"], call["offsets"], call["per_sample_weights"]
    if offsets is None:
        return ids if len(shape_of(ids)) == 2 else None
    if not isinstance(offsets, Node) or call_name(offsets) != "arange" or call["include_last_offset"]:
        return None
    start, *_, step = offsets.args if len(offsets.args) == 3 else (None, offsets.kwargs.get("step"))
    if start != 0 or not isinstance(step, int) or shape_of(offsets)[0] * step != shape_of(ids)[0]:
        return None
    write = Writer(node)
    if weights is not None:
        call["per_sample_weights"] = write(torch.reshape, weights, (-1, step))
    return write(torch.reshape, ids, (-1, step))


def _pooled(write: Writer, found: Node, ids: Node, call: dict[str, Any]) -> Node:
    """Return (bags, dim) of rows (bags, length, dim). Padding counts for nothing; a bag of nothing else is zero."""
    mode, padding, weights = call["mode"], call["padding_idx"], call["per_sample_weights"]
    if weights is not None:
        found = write(torch.mul, found, write(torch.unsqueeze, weights, -1))
    if padding is None:
        return write(POOLS[mode], found, 1)
    is_padding = write(torch.unsqueeze, write(torch.eq, ids, padding), -1)
    if mode == "max":
        largest = write(torch.amax, write(torch.masked_fill, found, is_padding, float("-inf")), 1)
        return write(torch.masked_fill, largest, write(torch.eq, largest, float("-inf")), 0.0)
    total = write(torch.sum, write(torch.masked_fill, found, is_padding, 0.0), 1)
    if mode == "sum":
        return total
    counted = write(torch.sum, write.method("float", write(torch.logical_not, is_padding)), 1)
    return write(torch.div, total, write(torch.clamp, counted, 1.0))


def _shorten_behind(node: Node) -> bool:
    """Let what reads a table behind `embedding_renorm_` read the shortened one; return whether it is a stored table."""
    table, _, max_norm, norm_type = node.args
    table = origin(table)  # type: ignore[arg-type]
    if not is_stored(table):
        return False
    order = {other: number for number, other in enumerate(node.graph.nodes)}
    shortened = Writer(node)(torch.renorm, table, norm_type, 0, max_norm)
    for reader in list(table.users):
        if reader is not shortened and order[reader] > order[node]:
            reader.replace_input_with(table, shortened)
    node.graph.erase_node(node)
    return True
