"""Questions about a graph that several passes ask: what moves data without changing values, what came from where."""

from __future__ import annotations

import operator
import types
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ptq4vit_fx.product_forms import PRODUCTS

#: What only moves or selects values, as a method, a function of torch or an operator of torch.export: quantizing before
#: or after it is the same.
MOVES = frozenset(
    {
        *("reshape", "view", "_unsafe_view", "reshape_as", "view_as", "flatten", "unflatten", "unfold", "im2col"),
        *("permute", "transpose", "swapaxes", "movedim", "t", "T", "mT", "squeeze", "unsqueeze", "contiguous"),
        *("clone", "alias", "detach", "expand", "expand_as", "repeat", "repeat_interleave", "roll", "type_as"),
        *("unbind", "chunk", "split", "split_with_sizes", "narrow", "select", "slice", "index_select", "getitem"),
    }
)
#: Calls that return several views of one tensor.
TAKEN_APART = frozenset({"chunk", "unsafe_chunk", "split", "split_with_sizes", "tensor_split", "unbind"})
#: What else gives a view, of a part or in another order.
VIEWS = MOVES | {
    *("tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_split", "unsafe_chunk", "diagonal", "as_strided"),
    *("swapdims", "moveaxis", "ravel", "broadcast_to", "adjoint", "mH", "H", "real", "view_as_real", "data"),
}


def moves_only(node: Node) -> bool:
    """Return whether the node only moves values of its first argument."""
    return call_name(node) in MOVES


def call_name(node: Node) -> str:
    """Return what a call of torch, or of this package, is called, in whichever spelling; "" for anything else."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        return str(node.target.overloadpacket.__name__) if node.target.namespace in ("aten", "ptq4vit_fx") else ""
    if node.target is getattr:  # x.mT
        return str(node.args[1])
    if isinstance(node.target, types.FunctionType) and not node.target.__module__.startswith(("torch.", "ptq4vit_fx.")):
        return ""
    return str(getattr(node.target, "__name__", ""))


def permutation(node: Node, ndim: int) -> list[int] | None:
    """Return for each dimension of the result the one of the operand, None if the node permutes no dimensions."""
    name, arguments = call_name(node), node.args[1:]
    numbers: Any = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)) else arguments
    if name == "mT":
        name, numbers = "transpose", (-2, -1)
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


def may_be_view(node: Node) -> bool:
    """Return whether the value of a node may share the memory of its first argument."""
    return call_name(node) in VIEWS


def memory_of(node: Node) -> Node:
    """Return the node whose memory this value may share: walk back through views."""
    while may_be_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def overwrites(node: Node) -> bool:
    """Return whether the call changes a tensor that it is given, so that it matters even if nobody reads its result."""
    if node.op == "call_method":
        return _says_in_place(str(node.target))
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and getattr(owner.get_submodule(str(node.target)), "inplace", False) is True
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    if node.target is operator.setitem or node.kwargs.get("inplace") is True:
        return True
    return isinstance(node.target, types.BuiltinFunctionType) and _says_in_place(node.target.__name__)


def downstream(node: Node) -> Iterator[Node]:
    """Yield the users of a node and of whatever element-wise or moving nodes follow, stopping at products."""
    seen: set[Node] = set()
    queue = list(node.users)
    while queue:
        user = queue.pop(0)
        if user in seen:
            continue
        seen.add(user)
        yield user
        if user.target not in PRODUCTS:
            queue.extend(user.users)


def _says_in_place(name: str) -> bool:
    """Return whether this is torch's name of a method or function that overwrites its first argument."""
    return name.endswith("_") and not name.endswith("__")


def is_stored(value: Any) -> TypeGuard[Node]:
    """Return whether this is a node that reads a parameter or buffer: what else has a target computes something."""
    return isinstance(value, Node) and value.op == "get_attr"


def stored_path(value: Any) -> str:
    """Return the path of the parameter or buffer that a node reads, "" for anything else."""
    return str(value.target) if is_stored(value) else ""


def get_attribute(graph_module: GraphModule, path: str) -> Any:
    """Return the parameter, buffer or module at a path."""
    return operator.attrgetter(path)(graph_module)
