"""Where the channels of a value go: their numbers are moved by the graph itself, as it moves the values.

Channels that are added to each other, as rotary embeddings add those of a pair, have to be scaled alike: they are one
group from there on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ptq4vit_fx.passes.graph.activations import MULTIPLICATIONS
from ptq4vit_fx.passes.graph.dataflow import call_name, get_attribute, is_stored, moves_only, stored_path
from ptq4vit_fx.passes.graph.marks import kind_of
from ptq4vit_fx.passes.graph.observer import ProductObserver
from ptq4vit_fx.passes.graph.shapes import example_of, is_tensor, shape_of

#: What is linear in several values, beside MULTIPLICATIONS by what does not depend on them.
SUMS = (
    torch.add,
    operator.add,
    "add",
    torch.ops.aten.add.Tensor,
    torch.sub,
    operator.sub,
    "sub",
    torch.ops.aten.sub.Tensor,
)
NEGATIONS = frozenset({"neg", "negative"})
JOINS = frozenset({"cat", "concat", "concatenate", "stack"})


@dataclass(frozen=True)
class Reader:
    """A node that reads moved channels and does something else than move them.

    value: what it reads. numbers: which channel each entry of that value is, float64, in its shape; of entries that are
    sums, any of theirs. is_moved: whether values are moved or multiplied with positive numbers, no more.
    """

    node: Node
    value: Node
    numbers: Tensor
    is_moved: bool = True

    def along_last(self) -> Tensor | None:
        """Return the channel of each entry of the last dimension, int64; None if it depends on the other ones."""
        rows = self.numbers.reshape(-1, self.numbers.shape[-1])
        return rows[0].long() if bool((rows == rows[0]).all()) else None


class Groups:
    """Which channels are added to which other ones: the smallest number of each one's group."""

    def __init__(self) -> None:
        self._smaller: dict[float, float] = {}

    def path(self, number: float) -> Iterator[float]:
        """Yield a number and those that it was joined to, one after the other, up to the smallest of its group."""
        yield number
        while number in self._smaller:
            number = self._smaller[number]
            yield number

    def first(self, number: float) -> float:
        """Return the smallest number of this channel's group."""
        while number in self._smaller:
            number = self._smaller[number]
        return number

    def join(self, one: Tensor, other: Tensor) -> list[tuple[float, float]]:
        """Let the channels that meet in any entry of two tensors of numbers, of one shape, be of one group.

        Return the smallest numbers of the groups that became one, the lower of each pair first.
        """
        joined = []
        for pair in _distinct_pairs(one.flatten().long(), other.flatten().long()):
            low, high = sorted(map(self.first, pair))
            if low != high:
                self._smaller[high] = low
                joined.append((low, high))
        return joined

    def all_of(self, numbers: Tensor, channels: int) -> Tensor:
        """Return every channel below `channels`, float64, that is in a group of one of these numbers."""
        every = torch.arange(channels, dtype=torch.float64)
        return every[torch.isin(self.firsts(every), self.firsts(numbers))]

    def firsts(self, numbers: Tensor) -> Tensor:
        """Return the smallest number of the group of each channel, in the shape of the numbers."""
        if not self._smaller:
            return numbers
        found, places = torch.unique(numbers, return_inverse=True)
        return torch.tensor([self.first(number) for number in found.tolist()], dtype=numbers.dtype)[places]


def _distinct_pairs(one: Tensor, other: Tensor) -> list[tuple[float, float]]:
    """Return the different pairs, in order: torch sorts rows ten times as slowly as the one number made of each."""
    if not len(one):
        return []
    lowest, width = other.min(), other.max() - other.min() + 1
    found = torch.unique(one * width + (other - lowest))
    left = found.div(width, rounding_mode="floor")
    return list(zip(left.tolist(), (found - left * width + lowest).tolist(), strict=True))


def readers_of(
    graph_module: GraphModule,
    start: Node,
    numbers: Tensor | None = None,
    *,
    scaled: bool,
    groups: Groups | None = None,
) -> list[Reader]:
    """Return what reads the channels of `start`, through whatever only moves them.

    numbers: of the channels, in the shape of `start`; by default they are counted along its last dimension. scaled:
    whether to go on through multiplications with a positive number. groups: to go on through sums of channels too, and
    through multiplications with whatever does not depend on them; it gets the channels that meet. A mean over entries
    of one channel counts as a move. Reads of the shape are none. The graph itself moves the numbers: no list of what
    every reshape does is needed; only what lies between is run, on the example's shapes.
    """
    interpreter = Interpreter(graph_module, garbage_collect_values=False)
    shape = shape_of(start)
    counted = torch.arange(shape[-1], dtype=torch.float64).expand(shape).contiguous()
    interpreter.env[start] = counted if numbers is None else numbers
    found, moved_values = list[Reader](), {start: None}  # in the order of the graph
    with torch.inference_mode():
        for user in list(graph_module.graph.nodes):
            values = [v for v in user.all_input_nodes if v in moved_values and _reads(graph_module, user, v)]
            if not values:
                continue
            moved = _moved(graph_module, interpreter, user, values, scaled=scaled, groups=groups)
            if moved is None:
                found.extend(Reader(user, value, interpreter.env[value]) for value in values)
            else:
                interpreter.env[user] = moved
                moved_values[user] = None
    return found


def written_by(graph_module: GraphModule, node: Node) -> Node:
    """Return what computed the channels of a value: back through moves and multiplications with positive numbers."""
    while True:
        if is_observer(graph_module, node):
            node = cast("Node", node.args[3])
        elif (moves_only(node) or positive_factor(graph_module, node) is not None) and isinstance(node.args[0], Node):
            node = node.args[0]
        else:
            return node


def mixed_by(graph_module: GraphModule, node: Node) -> Node | None:
    """Return the one linear layer whose channels a value is sums and products of, None if there is not one."""
    found, waiting, seen = set[Node](), [node], set[Node]()
    while waiting:
        source = written_by(graph_module, waiting.pop())
        if source in seen:
            continue
        seen.add(source)
        if kind_of(source) == "linear":
            found.add(source)
        elif call_name(source) in {"to", *NEGATIONS, *JOINS} or source.target in (*SUMS, *MULTIPLICATIONS):
            waiting.extend(source.all_input_nodes)
    return found.pop() if len(found) == 1 else None


def positive_factor(graph_module: GraphModule, node: Node) -> float | None:
    """Return the positive number that a node multiplies by, None if it does something else."""
    factor = node.args[1] if node.target in MULTIPLICATIONS and len(node.args) == 2 else None
    if is_stored(factor):
        value = get_attribute(graph_module, stored_path(factor))
        factor = float(value) if value.numel() == 1 else None
    return float(factor) if isinstance(factor, (int, float)) and factor > 0 else None


def _reads(graph_module: GraphModule, user: Node, value: Node) -> bool:
    """Return whether a node reads the values of another: not its shape or dtype, not what an observer is shown."""
    if user.op == "output":
        return True
    is_shown = is_observer(graph_module, user) and user.args[3] is not value
    is_like = moves_only(user) and user.args[0] is not value  # type_as, expand_as
    return not (is_shown or is_like or _gives_no_tensor(graph_module, user))


def _gives_no_tensor(graph_module: GraphModule, node: Node) -> bool:
    result = example_of(graph_module, node)
    return not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))


def _moved(
    graph_module: GraphModule,
    interpreter: Interpreter,
    user: Node,
    values: list[Node],
    *,
    scaled: bool,
    groups: Groups | None,
) -> Any:
    """Return the moved numbers, None if the user does something else than move them."""
    value = values[0]
    if is_observer(graph_module, user):
        return interpreter.env[value]
    if len(values) > 1 or user.args[:1] != (value,):
        return None if groups is None else _mixed(graph_module, interpreter, user, values, groups)
    if scaled and positive_factor(graph_module, user) is not None:
        return interpreter.env[value]
    is_unchanged = call_name(user) == "pad" and shape_of(user) == shape_of(value)
    if is_unchanged or moves_only(user):
        return interpreter.env[value] if is_unchanged else _run(graph_module, interpreter, user)
    if call_name(user) == "mean":
        mean, own = _run(graph_module, interpreter, user), interpreter.env[value]
        interpreter.env[value] = own.square()
        of_squares = _run(graph_module, interpreter, user)
        interpreter.env[value] = own
        return mean if torch.equal(mean.square(), of_squares) else None
    return None if groups is None else _mixed(graph_module, interpreter, user, values, groups)


def _mixed(
    graph_module: GraphModule, interpreter: Interpreter, user: Node, values: list[Node], groups: Groups
) -> Tensor | None:
    """Return the numbers behind what is linear in the channels: products, sums, concatenation, another sign."""
    tensors = [node for node in user.all_input_nodes if is_tensor(node)]
    name = call_name(user)
    if name in JOINS and tensors == values:
        joined = _run(graph_module, interpreter, user)
        return cast("Tensor", joined)
    if name == "to" and example_of(graph_module, user).dtype == example_of(graph_module, values[0]).dtype:
        return cast("Tensor", interpreter.env[values[0]])
    is_product = user.target in MULTIPLICATIONS and len(values) == 1 and user.args[0] is not user.args[1]
    is_sum = user.target in SUMS and len(user.args) == 2 and len(values) == 2
    if not (name in NEGATIONS or is_product or is_sum) or user.kwargs:
        return None
    spread: list[Tensor] = [interpreter.env[value].broadcast_to(shape_of(user)) for value in values]
    if is_sum:
        groups.join(*spread)
    return spread[0]


def _run(graph_module: GraphModule, interpreter: Interpreter, node: Node) -> Any:
    for operand in node.all_input_nodes:
        interpreter.env.setdefault(operand, example_of(graph_module, operand))
    return interpreter.run_node(node)


def is_observer(graph_module: GraphModule, node: Node) -> bool:
    """Return whether a node shows a product to a recorder, and returns its result unchanged."""
    return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), ProductObserver)
