"""Where the channels of a value go: their numbers are moved by the graph itself, as it moves the values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ptq4vit_fx.passes.graph.activations import MULTIPLICATIONS
from ptq4vit_fx.passes.graph.dataflow import call_name, get_attribute, is_stored, moves_only, stored_path
from ptq4vit_fx.passes.graph.observer import ProductObserver
from ptq4vit_fx.passes.graph.shapes import example_of, shape_of


@dataclass(frozen=True)
class Reader:
    """A node that reads moved channels and does something else than move them.

    value: what it reads. numbers: which channel each entry of that value is, float64, in its shape.
    """

    node: Node
    value: Node
    numbers: Tensor

    def along_last(self) -> Tensor | None:
        """Return the channel of each entry of the last dimension, int64; None if it depends on the other ones."""
        rows = self.numbers.reshape(-1, self.numbers.shape[-1])
        return rows[0].long() if bool((rows == rows[0]).all()) else None


def readers_of(graph_module: GraphModule, start: Node, numbers: Tensor | None = None, *, scaled: bool) -> list[Reader]:
    """Return what reads the channels of `start`, through whatever only moves them.

    numbers: of the channels, in the shape of `start`; by default they are counted along its last dimension. scaled:
    whether to go on through multiplications with a positive number. A mean over entries of one channel counts as a
    move. Reads of the shape are none. The graph itself moves the numbers: no list of what every reshape does is needed;
    only what lies between is run, on the example's shapes.
    """
    interpreter = Interpreter(graph_module, garbage_collect_values=False)
    shape = shape_of(start)
    counted = torch.arange(shape[-1], dtype=torch.float64).expand(shape).contiguous()
    interpreter.env[start] = counted if numbers is None else numbers
    found, waiting = [], [start]
    with torch.inference_mode():
        while waiting:
            value = waiting.pop(0)
            for user in _users(graph_module, value):
                moved = _moved(graph_module, interpreter, user, value, scaled=scaled)
                if moved is None:
                    found.append(Reader(user, value, interpreter.env[value]))
                elif user not in interpreter.env:
                    interpreter.env[user] = moved
                    waiting.append(user)
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


def positive_factor(graph_module: GraphModule, node: Node) -> float | None:
    """Return the positive number that a node multiplies by, None if it does something else."""
    factor = node.args[1] if node.target in MULTIPLICATIONS and len(node.args) == 2 else None
    if is_stored(factor):
        value = get_attribute(graph_module, stored_path(factor))
        factor = float(value) if value.numel() == 1 else None
    return float(factor) if isinstance(factor, (int, float)) and factor > 0 else None


def _users(graph_module: GraphModule, value: Node) -> Iterator[Node]:
    """Yield what reads the values of a node: not its shape or dtype, not what an observer is shown of a product."""
    for user in value.users:
        is_shown = is_observer(graph_module, user) and user.args[3] is not value
        is_like = moves_only(user) and user.args[0] is not value  # type_as, expand_as
        if user.op == "output" or not (is_shown or is_like or _gives_no_tensor(graph_module, user)):
            yield user


def _gives_no_tensor(graph_module: GraphModule, node: Node) -> bool:
    result = example_of(graph_module, node)
    return not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))


def _moved(graph_module: GraphModule, interpreter: Interpreter, user: Node, value: Node, *, scaled: bool) -> Any:
    """Return the moved numbers, None if the user does something else than move them."""
    if is_observer(graph_module, user):
        return interpreter.env[value]
    if scaled and user.args[:1] == (value,) and positive_factor(graph_module, user) is not None:
        return interpreter.env[value]
    is_unchanged = call_name(user) == "pad" and shape_of(user) == shape_of(value)
    if is_unchanged or (moves_only(user) and user.args[:1] == (value,)):
        return interpreter.env[value] if is_unchanged else _run(graph_module, interpreter, user)
    if call_name(user) == "mean" and user.args[:1] == (value,):
        mean, own = _run(graph_module, interpreter, user), interpreter.env[value]
        interpreter.env[value] = own.square()
        of_squares = _run(graph_module, interpreter, user)
        interpreter.env[value] = own
        return mean if torch.equal(mean.square(), of_squares) else None
    return None


def _run(graph_module: GraphModule, interpreter: Interpreter, node: Node) -> Any:
    for operand in node.all_input_nodes:
        interpreter.env.setdefault(operand, example_of(graph_module, operand))
    return interpreter.run_node(node)


def is_observer(graph_module: GraphModule, node: Node) -> bool:
    """Return whether a node shows a product to a recorder, and returns its result unchanged."""
    return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), ProductObserver)
