"""Who reads the channels that a linear layer writes, and whether what balances them may change those rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.channels import Groups, Reader, mixed_by, readers_of, written_by
from ptq4vit_fx.passes.graph.dataflow import is_stored
from ptq4vit_fx.passes.graph.marks import kind_of


class Unbalanced(Exception):  # noqa: N818 - an answer, no error
    """Why channels cannot be balanced."""


@dataclass
class Readers:
    """What reads the linear layers of a graph, each followed once."""

    graph_module: GraphModule
    #: Through positive factors and without.
    known: dict[tuple[Node, bool], list[Reader]] = field(default_factory=dict)
    #: Through sums of channels and products with what does not depend on them, and which channels meet there.
    mixed: dict[Node, tuple[list[Reader], Groups]] = field(default_factory=dict)

    def all_of(self, node: Node, *, scaled: bool) -> list[Reader]:
        """Return what reads a node, as `readers_of` does."""
        if (node, scaled) not in self.known:
            self.known[node, scaled] = readers_of(self.graph_module, node, scaled=scaled)
        return self.known[node, scaled]

    def operand(self, node: Node, place: int, *, scaled: bool, what: str) -> Reader:
        """Return how a product reads an operand; raises Unbalanced, which calls it `what`, as `of` does."""
        writer = written_by(self.graph_module, cast("Node", node.args[place]))
        return self.of(writer, node, place, scaled=scaled, what=what)

    def of(self, writer: Node, node: Node, place: int, *, scaled: bool, what: str) -> Reader:
        """Return how a node reads an operand; raises Unbalanced unless rows of a linear layer give it to it alone."""
        return _only(self.all_of(writer, scaled=scaled), writer, node, place, what, Groups())

    def mixed_operand(self, node: Node, place: int, what: str) -> tuple[Reader, Node, Groups]:
        """Return how a product reads an operand, the layer that writes it, and which channels are added on the way.

        Raises Unbalanced as `of` does.
        """
        operand = cast("Node", node.args[place])
        writer = written_by(self.graph_module, operand)
        mixed = None if kind_of(writer) == "linear" else mixed_by(self.graph_module, operand)
        if mixed is None:
            return self.of(writer, node, place, scaled=True, what=what), writer, Groups()
        if mixed not in self.mixed:
            groups = Groups()
            self.mixed[mixed] = readers_of(self.graph_module, mixed, scaled=True, groups=groups), groups
        readers, groups = self.mixed[mixed]
        return replace(_only(readers, mixed, node, place, what, groups), is_moved=False), mixed, groups


def _only(readers: list[Reader], writer: Node, node: Node, place: int, what: str, groups: Groups) -> Reader:
    if kind_of(writer) != "linear" or not is_stored(writer.args[1]) or not has_constant_bias(writer):
        raise Unbalanced(f"its {what} come out of {writer.name}, not of a linear layer with stored weights")
    mine = [r for r in readers if r.node is node and r.value is node.args[place]]
    if len(mine) != 1:
        raise Unbalanced(f"its {what} are changed on their way from {writer.name}")
    rows = groups.firsts(distinct(mine[0].numbers))
    for other in readers:
        if other is not mine[0] and bool(torch.isin(groups.firsts(other.numbers), rows).any()):
            raise Unbalanced(f"{other.node.name} reads its {what} too")
    return mine[0]


def has_constant_bias(node: Node) -> bool:
    """Return whether a product has no bias, or a stored one."""
    bias = node.args[2] if kind_of(node) == "linear" else None
    return bias is None or is_stored(bias)


def distinct(x: Tensor) -> Tensor:
    """Return the distinct numbers of x, or its distinct rows if it has several dimensions of pairs, sorted."""
    found: Tensor = torch.unique(x, dim=0 if x.ndim == 2 and x.shape[1] == 2 else None)
    return found
