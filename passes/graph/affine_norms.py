"""Normalizations that give stored weight * normalized + stored bias along one dimension, and where a call has them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.channel_places import Channels
from ptq4vit_fx.passes.graph.dataflow import call_name, is_stored
from ptq4vit_fx.passes.graph.norms import NORMS, normalizes
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import is_tensor, shape_of

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_GROUP_NORM = ("input", "num_groups", "weight", "bias", "eps")
#: Function -> its parameters in their order; those of torch.export's operators are in their schema.
PARAMETERS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: _BATCH_NORM,
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    F.group_norm: _GROUP_NORM,
    torch.group_norm: _GROUP_NORM,
}
#: What a norm is multiplied with and what is added; a batch norm's statistics are stored too, or it looks at the batch.
WEIGHTS = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")


def parameters_of(node: Node) -> tuple[str, ...]:
    """Return the names of the parameters of a call that normalizes, () for any other node."""
    name = call_name(node)
    if name not in (*NORMS, "batch_norm", "group_norm") or node.op != "call_function":
        return ()
    if isinstance(node.target, OpOverload):
        return tuple(argument.name for argument in node.target._schema.arguments)
    return PARAMETERS.get(node.target, NORMS.get(name, ()))


def place_of(node: Node, parameter: str) -> int | str:
    """Return where a call that normalizes has an argument: its position, or its name if it is given by that or not."""
    position = parameters_of(node).index(parameter)
    return position if position < len(node.args) else parameter


def argument(node: Node, parameter: str) -> Any:
    """Return an argument of a call that normalizes, None if it is not given."""
    place = place_of(node, parameter)
    return node.args[place] if isinstance(place, int) else node.kwargs.get(place)


def affine_dimension(graph_module: GraphModule, node: Node) -> int | None:
    """Return along which dimension, counted from the end, a norm has stored weights, or could have: None for no norm.

    A batch norm must use its stored statistics.
    """
    if not is_tensor(node):
        return None
    if is_norm_module(graph_module, node):
        return 1 - len(shape_of(node))
    if not parameters_of(node) or not all(_stored_or_none(argument(node, name)) for name in _weights(node)):
        return None
    if call_name(node) in NORMS:
        return -1 if normalizes(graph_module, node, Channels(-1)) else None
    if call_name(node) == "batch_norm":
        statistics = all(is_stored(argument(node, name)) for name in STATISTICS)
        return 1 - len(shape_of(node)) if statistics and not argument(node, "training") else None
    return 1 - len(shape_of(node))


def is_norm_module(graph_module: GraphModule, node: Node) -> bool:
    """Return whether a node calls torch's own module of batch norm, with statistics of its own, or of group norm."""
    module: Any = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return not module.training and module.running_mean is not None
    return type(module) is nn.GroupNorm


def is_batch_norm(graph_module: GraphModule, node: Node) -> bool:
    """Return whether a node is a batch norm with stored statistics, a module or a call."""
    is_module = node.op == "call_module" and type(graph_module.get_submodule(str(node.target))) is not nn.GroupNorm
    return affine_dimension(graph_module, node) is not None and (is_module or call_name(node) == "batch_norm")


def opened_norm(graph_module: GraphModule, node: Node) -> Node:
    """Return a norm as a call with its tensors: a call of a module is written so, in its place."""
    if not is_norm_module(graph_module, node):
        return node
    module: Any = graph_module.get_submodule(str(node.target))
    write, is_group = Writer(node), type(module) is nn.GroupNorm
    tensors = {
        name: None if getattr(module, name) is None else write.attribute(f"{node.target}.{name}")
        for name in (WEIGHTS if is_group else (*STATISTICS, *WEIGHTS))
    }
    if is_group:
        call = write(F.group_norm, node.args[0], module.num_groups, **tensors, eps=module.eps)
    else:
        call = write(F.batch_norm, node.args[0], **tensors, training=False, eps=module.eps)
    replace(node, call)
    return call


def _weights(node: Node) -> tuple[str, ...]:
    return tuple(name for name in WEIGHTS if name in parameters_of(node))


def _stored_or_none(value: Any) -> bool:
    return value is None or is_stored(value)
