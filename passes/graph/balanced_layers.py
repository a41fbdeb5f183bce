"""A balance with the nodes that it changes: rows of the layers that write channels, columns of those that read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from ptq4vit_fx.balances import Balance, BalanceKind
from ptq4vit_fx.passes.graph.marks import planned_product, scope_of

#: The field of `Transforms` that asks for each kind.
FIELDS: dict[BalanceKind, str] = {
    "norm": "norms",
    "value": "attention",
    "key": "attention",
    "gate": "gates",
    "convolution": "convolutions",
    "depthwise": "depthwise",
}


@dataclass(frozen=True)
class Rows:
    """Outputs of a product with a weight or of a normalization: the channel of each, -1 if it is of none.

    times: whether they are multiplied by the scale, as queries are, instead of shifted and divided.
    """

    node: Node
    numbers: Tensor
    times: bool = False


@dataclass(frozen=True)
class Columns:
    """Inputs of a product with a weight: the channel of each, -1 if it is of none."""

    node: Node
    numbers: Tensor


@dataclass(frozen=True)
class Place:
    """A balance and the nodes that it changes."""

    balance: Balance
    writers: tuple[Rows, ...]
    readers: tuple[Columns, ...]


def name_of(node: Node) -> str:
    """Return what a plan calls a layer: its name as a product, else its module or node."""
    return planned_product(node) or scope_of(node) or node.name
