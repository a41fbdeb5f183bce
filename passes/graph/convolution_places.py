"""Where channels of convolutions can be scaled: through ReLU, pools and sums; else in front of a depthwise one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.balances import Balance
from ptq4vit_fx.names import site
from ptq4vit_fx.passes.graph.balanced_layers import FIELDS, Columns, Place, Rows, name_of
from ptq4vit_fx.passes.graph.channel_classes import FIXED, HOMOGENEOUS, POOLS, ChannelClasses, channel_classes
from ptq4vit_fx.passes.graph.channels import Groups, written_by
from ptq4vit_fx.passes.graph.dataflow import call_name
from ptq4vit_fx.passes.graph.marks import kind_of, planned_product
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.streams import described
from ptq4vit_fx.plan import Transformed

INPUT = "it reads an input of the model"


def convolution_places(graph_module: GraphModule) -> tuple[list[Place], list[Transformed]]:
    """Return a balance for all channels that some products read together, and what was found of every convolution.

    Channels that no convolution reads or writes are left to the other balances.
    """
    classes = channel_classes(graph_module)
    written, read = ({node: classes.roots(x) for node, x in of.items()} for of in (classes.written, classes.read))
    places = list(_places(written, read))
    done = {columns.node: place for place in places for columns in place.readers}
    notes = []
    for node in graph_module.graph.nodes:
        place, name = done.get(node), planned_product(node)
        if place is not None and place.balance.name == site(name_of(node), "lhs"):
            notes.append(
                Transformed(FIELDS["convolution"], name_of(node), True, f"{place.balance.channels} channels scaled")
            )
        elif place is None and kind_of(node) == "conv2d" and name is not None:
            notes.append(Transformed(FIELDS["convolution"], name, False, _reason(graph_module, node, classes)))
    return places, notes


def depthwise_places(graph_module: GraphModule, taken: Collection[Node]) -> tuple[list[Place], list[Transformed]]:
    """Return a balance in front of every planned depthwise convolution, but for those that are taken already.

    Nothing has to be known of what computes its input: each channel is divided in front of the convolution, and
    multiplied in the part of its weight that reads it alone.
    """
    places, notes = [], []
    for node in graph_module.graph.nodes:
        name = planned_product(node)
        if name is None or kind_of(node) != "conv2d" or node.args[6] == 1 or node in taken:
            continue
        lhs = cast("Node", node.args[0])
        channels = shape_of(lhs)[-3]
        refused = "it has several channels in a group" if node.args[6] != channels else ""
        if not refused and written_by(graph_module, lhs).op == "placeholder":
            refused = INPUT
        notes.append(Transformed(FIELDS["depthwise"], name, not refused, refused or f"{channels} channels scaled"))
        if not refused:
            balance = Balance("depthwise", site(name, "lhs"), (), (name,), channels, shifts=False)
            places.append(Place(balance, (), (Columns(node, torch.arange(channels)),)))
    return places, notes


def _places(written: dict[Node, Tensor], read: dict[Node, Tensor]) -> Iterator[Place]:
    """Yield the balances, in the order of their first readers."""
    for own in _together(read.values()):
        writers = tuple(Rows(node, numbers) for node, numbers in _numbered(written, own))
        readers = tuple(Columns(node, numbers) for node, numbers in _numbered(read, own))
        nodes = [[layer.node for layer in writers], [layer.node for layer in readers]]
        planned = [name for node in nodes[1] if (name := planned_product(node)) is not None]
        if planned and any(kind_of(node) == "conv2d" for node in (*nodes[0], *nodes[1])):
            from_, to = (tuple(map(name_of, layers)) for layers in nodes)
            balance = Balance("convolution", site(planned[0], "lhs"), from_, to, len(own), shifts=False)
            yield Place(balance, writers, readers)


def _together(read: Iterable[Tensor]) -> list[Tensor]:
    """Return the classes that can be scaled in groups, sorted: two that one product reads are in one group."""
    groups, found = Groups(), dict[int, None]()
    for numbers in read:
        mine = torch.unique(numbers[numbers > FIXED])
        groups.join(mine, mine[:1].expand_as(mine))
        found |= dict.fromkeys(mine.tolist())
    together: dict[float, list[int]] = {}
    for number in found:
        together.setdefault(groups.first(number), []).append(number)
    return [torch.tensor(sorted(own)) for own in together.values()]


def _numbered(layers: dict[Node, Tensor], own: Tensor) -> Iterator[tuple[Node, Tensor]]:
    """Yield the layers that have some of these classes, with the place of each of their channels in them, or -1."""
    for node, numbers in layers.items():
        places = torch.searchsorted(own, numbers).clamp_(max=len(own) - 1)
        mine = own[places] == numbers
        if bool(mine.any()):
            yield node, torch.where(mine, places, -1)


def _reason(graph_module: GraphModule, node: Node, classes: ChannelClasses) -> str:
    """Return why no channel that a convolution reads can be scaled."""
    numbers = classes.read.get(node)
    for number in [] if numbers is None else numbers.tolist():
        if reason := classes.reason(number):
            return reason
    source = written_by(graph_module, cast("Node", node.args[0]))
    while call_name(source) in (*HOMOGENEOUS, *POOLS) and isinstance(source.args[0], Node):
        source = written_by(graph_module, source.args[0])
    return INPUT if source.op == "placeholder" else f"it reads {described(source)}"
