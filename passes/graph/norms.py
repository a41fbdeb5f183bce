"""Normalizations over the channels in a canonical graph, whole or written out, and the weights behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.names import join
from ptq4vit_fx.passes.graph.activations import MULTIPLICATIONS
from ptq4vit_fx.passes.graph.channel_places import Channels, averaged_dimensions
from ptq4vit_fx.passes.graph.dataflow import call_name, is_stored, origin, stored_path
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import is_tensor, shape_of

#: Calls that normalize, with their parameters.
NORMS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}
POWERS = ("pow", "__pow__", "square")


@dataclass(frozen=True)
class Affine:
    """A node that multiplies channels by stored weights, and adds others: a norm, or the factor behind one written out.

    size: so many of each. gamma, beta: paths of the weights, "" for none.
    """

    node: Node
    size: int
    gamma: str
    beta: str = ""


def normalizes(graph_module: GraphModule, node: Node, channels: Channels) -> bool:
    """Return whether a node normalizes over all channels, which lie at `channels`, with stored weights or none."""
    if channels.dim != -1:
        return False
    if is_rms_norm_module(graph_module, node):
        shape: Any = getattr(graph_module.get_submodule(str(node.target)), "normalized_shape", ())
        return tuple(shape) == shape_of(node)[-1:]
    call = arguments_of(node)
    sizes = call.get("normalized_shape", ())
    weights = [call.get(name) for name in ("weight", "bias")]
    over = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return over == shape_of(node)[-1:] and all(weight is None or is_stored(weight) for weight in weights)


def is_rms_norm_module(graph_module: GraphModule, node: Node) -> bool:
    """Return whether a node calls torch's module of RMSNorm, which stays a module in canonical graphs."""
    return node.op == "call_module" and type(graph_module.get_submodule(str(node.target))) is nn.RMSNorm


def affine_of(graph_module: GraphModule, node: Node) -> Affine | None:
    """Return the weights of a node that normalizes, None if it has none."""
    if is_rms_norm_module(graph_module, node):
        weight = getattr(graph_module.get_submodule(str(node.target)), "weight", None)
        return None if weight is None else Affine(node, shape_of(node)[-1], join(str(node.target), "weight"))
    gamma, beta = (stored_path(arguments_of(node).get(name)) for name in ("weight", "bias"))
    return Affine(node, shape_of(node)[-1], gamma, beta) if gamma or beta else None


def factor_of(node: Node, value: Node, channels: Channels) -> str | None:
    """Return the path of the stored vector that a node multiplies the channels of `value` by; None if it does not."""
    other = _other_factor(node, value)
    if other is None or not is_stored(origin(other)):
        return None
    shape = shape_of(other)
    size = shape_of(value)[channels.dim]
    along = -channels.dim <= len(shape) and shape[channels.dim] == size == math.prod(shape)
    return stored_path(origin(other)) if along and math.prod(shape_of(origin(other))) == size else None


def _other_factor(node: Node, value: Node) -> Node | None:
    if node.target not in MULTIPLICATIONS or len(node.args) != 2 or node.args[0] is node.args[1]:
        return None
    other = next((x for x in node.args if x is not value), None)
    return other if is_tensor(other) else None


def measured_from(node: Node) -> tuple[Node, Channels] | None:
    """Return the value whose squares a node averages over the last dimension: a root mean square, written out."""
    squares = node.args[0] if call_name(node) == "mean" and node.args else None
    if not isinstance(squares, Node) or averaged_dimensions(node) != [-1] or not _squares(squares):
        return None
    return cast("Node", squares.args[0]), Channels(-1)


def is_measured(node: Node, channels: Channels) -> bool:
    """Return whether a node takes of the channels their mean, or that of their squares, which no rotation changes."""
    if call_name(node) == "mean":
        return averaged_dimensions(node) == [channels.dim]
    return _squares(node) and all(
        call_name(user) == "mean" and averaged_dimensions(user) == [channels.dim] for user in node.users
    )


def _squares(node: Node) -> bool:
    exponent = node.kwargs.get("exponent", node.args[1] if len(node.args) > 1 else None)
    return call_name(node) == "square" or (call_name(node) in POWERS and bool(exponent == 2))


def norm_input(graph_module: GraphModule, node: Node) -> Node | None:
    """Return what a node normalizes, or takes the root mean square of, over its last dimension; None for any other."""
    measured = measured_from(node)
    if measured is not None:
        return measured[0]
    value = arguments_of(node).get("input") if call_name(node) in NORMS else None
    if is_rms_norm_module(graph_module, node):
        value = node.args[0] if node.args else None
    return value if is_tensor(value) else None


def without_weights(graph_module: GraphModule, node: Node) -> None:
    """Let a node normalize alone; a factor behind a norm written out goes."""
    if is_rms_norm_module(graph_module, node):
        module = cast("nn.RMSNorm", graph_module.get_submodule(str(node.target)))
        replace(node, Writer(node)(F.rms_norm, node.args[0], module.normalized_shape, None, module.eps))
    elif call_name(node) in NORMS:
        call = arguments_of(node)
        given: Any = call.pop("input")
        sizes = call.pop("normalized_shape")
        node.args = (given, sizes)
        node.kwargs = {name: None if name in ("weight", "bias") else value for name, value in call.items()}
    else:
        given = next(x for x in node.args if isinstance(x, Node) and not is_stored(origin(x)))
        replace(node, given)


def arguments_of(node: Node) -> dict[str, Any]:
    """Return the arguments of a call of layer_norm or rms_norm by their names, {} for any other node."""
    names = NORMS.get(call_name(node), ())
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs) if names else {}
