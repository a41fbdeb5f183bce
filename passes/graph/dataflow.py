"""Questions about a graph that several passes ask: what moves data without changing values, what came from where."""

from __future__ import annotations

import operator
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

#: Methods and functions that only move or select values: quantizing before or after them is the same.
MOVING_METHODS = frozenset(
    [
        "reshape",
        "view",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "swapaxes",
        "movedim",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "clone",
        "expand",
        "expand_as",
        "repeat",
        "unbind",
        "chunk",
        "split",
        "narrow",
        "select",
        "roll",
        "type_as",
        "t",
    ]
)
MOVING_FUNCTIONS = frozenset(
    {
        operator.getitem,
        torch.reshape,
        torch.flatten,
        torch.unflatten,
        torch.permute,
        torch.transpose,
        torch.swapaxes,
        torch.movedim,
        torch.squeeze,
        torch.unsqueeze,
        torch.unbind,
        torch.chunk,
        torch.split,
        torch.roll,
        torch.clone,
        F.unfold,
    }
)
#: The same as aten operators, of any overload: a graph of torch.export has these.
MOVING_OPERATORS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim"),
        *("squeeze", "unsqueeze", "contiguous", "clone", "alias", "detach", "expand", "expand_as", "repeat"),
        *("unbind", "chunk", "split", "split_with_sizes", "narrow", "select", "slice", "index_select", "roll", "t"),
        *("reshape_as", "view_as", "repeat_interleave", "im2col"),
    )
)


def moves_only(node: Node) -> bool:
    """Return whether the node only moves values of its first argument."""
    if node.op == "call_method":
        return node.target in MOVING_METHODS
    if isinstance(node.target, OpOverload):
        return node.target.overloadpacket in MOVING_OPERATORS
    return node.op == "call_function" and node.target in MOVING_FUNCTIONS


def shape_of(node: Node) -> tuple[int, ...]:
    """Return the shape that record_shapes noted, () for what is no tensor."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def call_name(node: Node) -> str:
    """Return what a call of torch, or of this package, is called, in whichever spelling; "" for anything else."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        return str(node.target.overloadpacket.__name__)
    if isinstance(node.target, types.FunctionType) and not node.target.__module__.startswith(("torch.", "ptq4vit_fx.")):
        return ""
    return str(getattr(node.target, "__name__", ""))


def permutation(node: Node, ndim: int) -> list[int] | None:
    """Return for each dimension of the result the one of the operand, None if the node permutes no dimensions."""
    name, arguments = call_name(node), node.args[1:]
    numbers: Any = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)) else arguments
    if name not in ("transpose", "swapaxes", "permute") or not all(isinstance(number, int) for number in numbers):
        return None
    if name == "permute":
        return [number % ndim for number in numbers]
    order, (a, b) = list(range(ndim)), numbers
    order[a], order[b] = order[b], order[a]
    return order


def origin(node: Node) -> Node:
    """Return the node that computed these values: walk back through nodes that only move them."""
    while moves_only(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def overwrites(node: Node) -> bool:
    """Return whether the call changes a tensor that it is given, so that it matters even if nobody reads its result."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and getattr(owner.get_submodule(str(node.target)), "inplace", False) is True
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    return node.target is operator.setitem or node.kwargs.get("inplace") is True


def downstream(node: Node) -> Iterator[Node]:
    """Yield the users of a node and of whatever element-wise or moving nodes follow, stopping at products."""
    stops = {F.linear, F.conv2d, torch.matmul}
    seen: set[Node] = set()
    queue = list(node.users)
    while queue:
        user = queue.pop(0)
        if user in seen:
            continue
        seen.add(user)
        yield user
        if user.target not in stops:
            queue.extend(user.users)


def module_path(node: Node) -> str:
    """Return the path of the module in whose forward this node was traced ("" for the root)."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def get_attribute(graph_module: GraphModule, target: str) -> Any:
    """Return the attribute that a get_attr node with this target reads."""
    return operator.attrgetter(target)(graph_module)


def adopt_meta(node: Node, like: Node, path: str | None = None) -> Node:
    """Give a new node the module stack of `like`, and `path` as its own innermost scope if given; return it."""
    stack = dict(like.meta.get("nn_module_stack", {}))
    if path is not None:
        stack[path] = (path, torch.nn.Module)
    node.meta["nn_module_stack"] = stack
    return node
