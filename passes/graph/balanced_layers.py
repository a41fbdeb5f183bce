"""A balance with the nodes that it changes: rows of the layers that write channels, columns of those that read them.

They are looked for once, in front of the calibration, and marked on their nodes: copies of the graph know them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

from torch import Tensor
from torch.fx import Graph, Node

from ptq4vit_fx.balances import Balance, BalanceKind
from ptq4vit_fx.names import Site
from ptq4vit_fx.passes.graph.marks import planned_product, scope_of

_BALANCED = "ptq4vit_balanced"

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


def mark_places(places: Iterable[Place]) -> None:
    """Mark the rows and columns of places on their nodes."""
    for place in places:
        made: list[tuple[Node, Callable[[Node], Rows | Columns]]] = [
            *((own.node, partial(Rows, numbers=own.numbers, times=own.times)) for own in place.writers),
            *((own.node, partial(Columns, numbers=own.numbers)) for own in place.readers),
        ]
        for order, (node, layer) in enumerate(made):
            node.meta[_BALANCED] = node.meta.get(_BALANCED, {}) | {(place.balance.name, order): layer}


def marked_places(graph: Graph, balances: Iterable[Balance]) -> list[Place]:
    """Return the places of the balances of a plan, as they were marked on the nodes of a graph."""
    found: dict[Site, list[tuple[int, Rows | Columns]]] = {}
    for node in graph.nodes:
        for (name, order), layer in node.meta.get(_BALANCED, {}).items():
            found.setdefault(name, []).append((order, layer(node)))
    places = []
    for balance in balances:
        layers = [layer for _, layer in sorted(found[balance.name], key=itemgetter(0))]
        writers = tuple(layer for layer in layers if isinstance(layer, Rows))
        places.append(Place(balance, writers, tuple(layer for layer in layers if isinstance(layer, Columns))))
    return places
