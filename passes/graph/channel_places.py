"""Where the channels of a stream lie in a value, followed through whatever moves it: the graph itself moves numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ptq4vit_fx.passes.graph.dataflow import call_name, is_stored, moves_only
from ptq4vit_fx.passes.graph.opaque import is_foreign
from ptq4vit_fx.passes.graph.shapes import dtype_of, example_of, is_tensor, shape_of

#: What sums over dimensions.
SUMS = ("mean", "sum")
#: Modules that move.
FLATTENING = (nn.Flatten, nn.Unflatten)
#: What averages, and over how many of the last dimensions.
POOLING: dict[type[nn.Module], int] = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2}
POOLING_FUNCTIONS = {"adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2}
#: Methods that change nothing of a float32 tensor.
CASTS = ("to", "float", "type")
#: Moves that read but the shape of their second operand.
SHAPED_LIKE = ("expand_as", "view_as", "reshape_as", "type_as")


@dataclass(frozen=True)
class Channels:
    """Dimension `dim`, counted from the end, holds all channels of a stream, in their order, `blocks` times."""

    dim: int
    blocks: int = 1


def source_of(graph_module: GraphModule, node: Node) -> tuple[Node, list[Node]] | None:
    """Return the value that a node moves, pads with zeros or sums up, and the nodes that do so; None for any other.

    A piece of a value that was split takes two nodes.
    """
    first = node.args[0] if node.args else None
    if not isinstance(first, Node) or not is_tensor(node):
        return None
    if not is_tensor(first) and call_name(node) == "getitem" and moves_only(first) and first.args:
        whole = first.args[0]
        return (whole, [first, node]) if is_tensor(whole) else None
    return (first, [node]) if is_tensor(first) and _carries(graph_module, node) else None


def _carries(graph_module: GraphModule, node: Node) -> bool:
    name = call_name(node)
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))) in (*FLATTENING, *POOLING)
    if name == "pad":
        mode, value = (*node.args[2:], None, None)[:2]
        mode, value = node.kwargs.get("mode", mode), node.kwargs.get("value", value)
        return mode in (None, "constant") and value in (None, 0)
    if name in CASTS:
        return dtype_of(node) is dtype_of(cast("Node", node.args[0]))
    computed = [other for other in node.all_input_nodes if is_tensor(other) and not is_stored(other)]
    if len(computed) > 1 and name not in SHAPED_LIKE:  # which places it takes depends on the input
        return False
    # A function of the model's own may be a move, as timm's window_reverse is: what it makes of numbers tells.
    return moves_only(node) or name in (*SUMS, *POOLING_FUNCTIONS) or is_foreign(node.target)


def shifts(node: Node) -> bool:
    """Return whether values that are one constant may be others behind a node: it puts zeros beside them, or adds them.

    A pad of no width, as where a window fits, does not.
    """
    pads = call_name(node) == "pad" and math.prod(shape_of(node)) > math.prod(shape_of(cast("Node", node.args[0])))
    return pads or call_name(node) == "sum"


def stacked(node: Node, channels: Channels) -> Channels:
    """Return where channels are behind a call of stack."""
    behind = _stacking_dimension(node) > channels.dim - 1
    return Channels(channels.dim - behind, channels.blocks)


def unstacked(node: Node, channels: Channels) -> Channels | None:
    """Return where channels are in what a call of stack stacks; None if it stacks along them."""
    dim = _stacking_dimension(node)
    return None if dim == channels.dim else Channels(channels.dim + (dim > channels.dim), channels.blocks)


def _stacking_dimension(node: Node) -> int:
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    ndim = len(shape_of(node))
    return int(dim % ndim - ndim)


def moved(
    graph_module: GraphModule, way: Sequence[Node], source: Node, channels: Channels, width: int
) -> Channels | None:
    """Return where the channels of `source` are behind the nodes of `way`; None if they are not whole there."""
    return _follower(graph_module, way, source, width)(channels)


def moved_back(
    graph_module: GraphModule, way: Sequence[Node], source: Node, wanted: Channels, width: int
) -> Channels | None:
    """Return where the channels are in `source` if they are at `wanted` behind the nodes of `way`."""
    shape, follow = shape_of(source), _follower(graph_module, way, source, width)
    possible = [Channels(dim, shape[dim] // width) for dim in range(-len(shape), 0) if shape[dim] % width == 0]
    return next((channels for channels in possible if follow(channels) == wanted), None)


def _follower(
    graph_module: GraphModule, way: Sequence[Node], source: Node, width: int
) -> Callable[[Channels], Channels | None]:
    """Return a function from the place of channels in `source` to that behind the nodes of `way`."""
    node, shape = way[-1], shape_of(source)
    if call_name(node) in SUMS:
        return lambda channels: _averaged(node, channels)
    if pooled := _pools(graph_module, node):
        return lambda channels: channels if channels.dim < -pooled else None
    # Number 0 is that of a padded zero.
    numbers = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)
    found = _run(graph_module, way, source, numbers).long() - 1
    if is_foreign(node.target):
        drawn = torch.randn(numbers.numel() + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn[-1] = 0.0  # what -1 takes
        valid = bool(((found >= -1) & (found < numbers.numel())).all())
        if not valid or not torch.equal(_run(graph_module, way, source, drawn[:-1].reshape(shape)), drawn[found]):
            return lambda channels: None
    return lambda channels: next(_places(found, shape, channels.dim, width), None)


def _run(graph_module: GraphModule, way: Sequence[Node], source: Node, values: Tensor) -> Tensor:
    """Return what the nodes of `way` make of values of `source`."""
    interpreter = Interpreter(graph_module, garbage_collect_values=False)
    interpreter.env[source] = values
    with torch.inference_mode():
        for step in way:
            for operand in step.all_input_nodes:
                interpreter.env.setdefault(operand, _example(graph_module, operand))
            interpreter.env[step] = interpreter.run_node(step)
    return cast("Tensor", interpreter.env[way[-1]])


def _example(graph_module: GraphModule, node: Node) -> Any:
    value = example_of(graph_module, node)
    return value.cpu() if isinstance(value, Tensor) else value


def _pools(graph_module: GraphModule, node: Node) -> int:
    """Return over how many of the last dimensions a node averages."""
    if node.op != "call_module":
        return POOLING_FUNCTIONS.get(call_name(node), 0)
    return POOLING.get(type(graph_module.get_submodule(str(node.target))), 0)


def averaged_dimensions(node: Node) -> list[int] | None:
    """Return the dimensions, counted from the end, that a call of mean or sum takes; None if all of them."""
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = [dims] if isinstance(dims, int) else dims
    ndim = len(shape_of(cast("Node", node.args[0])))
    return None if not dims else [dim % ndim - ndim for dim in dims]


def _averaged(node: Node, channels: Channels) -> Channels | None:
    dims = averaged_dimensions(node)
    if dims is None or channels.dim in dims:
        return None
    if len(shape_of(node)) == len(shape_of(cast("Node", node.args[0]))):
        return channels
    return Channels(channels.dim + sum(dim > channels.dim for dim in dims), channels.blocks)


def _places(found: Tensor, shape: tuple[int, ...], dim: int, width: int) -> Iterator[Channels]:
    """Yield the dimensions along which lie whole blocks of channels, each of one place of the source, or of padding.

    found: the number of each entry in a source of this shape, whose channels lie along `dim`; -1 for padding.
    """
    stride, size = math.prod(shape[dim:][1:]), shape[dim]
    channel = found // stride % size
    place = torch.where(found < 0, -1, found - channel % width * stride)
    for there in range(-found.ndim, 0):
        if found.shape[there] % width:
            continue
        blocks, places = (_in_blocks(x.movedim(there, -1), width) for x in (channel % width, place))
        ordered = (blocks == torch.arange(width)) | (places < 0)
        if bool(ordered.all()) and bool((places == places[..., :1]).all()):
            yield Channels(there, found.shape[there] // width)


def _in_blocks(x: Tensor, width: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, width)
