"""A residual stream as a value: where its channels are, which products write and read it, what forbids a rotation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node
from torch.fx.node import map_aggregate

from ptq4vit_fx.names import owner_of
from ptq4vit_fx.passes.graph.channel_places import Channels
from ptq4vit_fx.passes.graph.dataflow import call_name, moves_only, stored_path
from ptq4vit_fx.passes.graph.marks import kind_of, scope_of
from ptq4vit_fx.passes.graph.norms import Affine
from ptq4vit_fx.passes.graph.shapes import RESULT, Shape

ADDITIONS = ("add", "sub", "__add__", "__radd__", "__sub__")
#: What reads but the shape of a tensor.
SHAPED = ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty")


@dataclass(frozen=True)
class Reader:
    """How a product reads a stream: where the channels of its input are, and the weights that it must absorb."""

    channels: Channels
    affine: Affine | None = None


@dataclass(frozen=True)
class LayerScale:
    """A node behind a product that multiplies its channels by a stored vector."""

    node: Node
    path: str


@dataclass
class Stream:
    """What a search has found.

    name: the first normalization. values: nodes with the place of their channels, and the weights that they are behind.
    writers, readers: products; constants: stored values; affines: norms that lose their weights; scales: products that
    take a LayerScale. faults: nodes, each with a sentence why it forbids a rotation.
    """

    name: str
    width: int
    values: dict[Node, Reader] = field(default_factory=dict)
    writers: dict[Node, Channels] = field(default_factory=dict)
    readers: dict[Node, Reader] = field(default_factory=dict)
    constants: dict[Node, Channels] = field(default_factory=dict)
    affines: dict[Node, Affine] = field(default_factory=dict)
    scales: dict[Node, LayerScale] = field(default_factory=dict)
    faults: list[tuple[Node, str]] = field(default_factory=list)

    @property
    def is_residual(self) -> bool:
        """Return whether something that was computed is added to something else that was."""
        return any(
            call_name(node) in ADDITIONS and sum(operand in self.values for operand in node.all_input_nodes) > 1
            for node in self.values
        )

    @property
    def products(self) -> set[Node]:
        """Return the products that write or read it."""
        return {*self.writers, *self.readers}


def reads_shape(user: Node, node: Node) -> bool:
    """Return whether a call reads but the shape or the type of a value."""
    if call_name(user) in SHAPED:
        return True
    if moves_only(user) and user.args[0] is not node:
        return True
    found: list[Any] = []
    map_aggregate(user.meta.get(RESULT), lambda x: found.append(x) if isinstance(x, Shape) else None)
    return not found and user.op != "output"


def described(node: Node) -> str:
    """Return what a user knows a node by: its module, or its call and the module in whose forward that is."""
    if node.op in ("call_module", "get_attr", "placeholder"):
        return str(node.target)
    weight = next((stored_path(x) for x in (*node.args[1:2], node.kwargs.get("weight")) if stored_path(x)), "")
    if (kind_of(node) is not None or call_name(node).endswith("_norm")) and owner_of(weight):
        return owner_of(weight)
    scope = scope_of(node)
    name = "the model" if node.op == "output" else call_name(node) or getattr(node.target, "__name__", node.name)
    return f"{name} in {scope}" if scope else str(name)
