"""Where channels can be balanced: the rows and columns of weights that a `Balance` changes, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.balances import Balance, BalanceKind
from ptq4vit_fx.inputs.settings import Transforms
from ptq4vit_fx.names import site
from ptq4vit_fx.passes.graph.activations import MULTIPLICATIONS
from ptq4vit_fx.passes.graph.attention_rows import rows_sum_to_one, shifts_keys
from ptq4vit_fx.passes.graph.balanced_layers import FIELDS, Columns, Place, Rows, name_of
from ptq4vit_fx.passes.graph.channel_places import Channels
from ptq4vit_fx.passes.graph.channel_readers import Readers, Unbalanced, distinct, has_constant_bias
from ptq4vit_fx.passes.graph.channels import Groups, Reader, readers_of, written_by
from ptq4vit_fx.passes.graph.convolution_places import convolution_places, depthwise_places
from ptq4vit_fx.passes.graph.dataflow import call_name, is_stored
from ptq4vit_fx.passes.graph.marks import kind_of, planned_product
from ptq4vit_fx.passes.graph.norms import NORMS, is_rms_norm_module, normalizes
from ptq4vit_fx.passes.graph.shapes import is_tensor, shape_of
from ptq4vit_fx.plan import Transformed


def balance_places(graph_module: GraphModule, transforms: Transforms) -> tuple[list[Place], list[Transformed]]:
    """Return where the channels of a planned graph can be balanced, and what was found of every candidate."""
    search, places, notes = Readers(graph_module), list[Place](), list[Transformed]()
    for node in graph_module.graph.nodes:
        kind = _kind(graph_module, node)
        if kind is None or not getattr(transforms, FIELDS[kind]):
            continue
        name = name_of(node)
        try:
            place = _FINDERS[kind](search, node)
        except Unbalanced as reason:
            notes.append(Transformed(FIELDS[kind], name, False, str(reason)))
            continue
        shifted = " and shifted" if place.balance.shifts else ""
        note = f"{place.balance.channels} channels scaled{shifted}"
        notes.append(Transformed(FIELDS[kind], name, True, note))
        places.append(place)
    if transforms.convolutions:
        between, noted = convolution_places(graph_module)
        places, notes = places + between, notes + noted
    if transforms.depthwise:
        taken = {columns.node for place in places for columns in place.readers}
        in_front, noted = depthwise_places(graph_module, taken)
        places, notes = places + in_front, notes + noted
    return places, notes


def _kind(graph_module: GraphModule, node: Node) -> BalanceKind | None:
    """Return what might be balanced at a node."""
    if call_name(node) in NORMS or is_rms_norm_module(graph_module, node):
        return "norm"
    name = planned_product(node)
    if kind_of(node) == "matmul" and name is not None and not any(is_stored(x) for x in node.args[:2]):
        return "value" if rows_sum_to_one(graph_module, node) is not None else "key"
    if kind_of(node) == "linear" and name is not None:
        source = written_by(graph_module, cast("Node", node.args[0]))
        return "gate" if _factors_of_gate(graph_module, source) else None
    return None


def _norm(search: Readers, node: Node) -> Place:
    """Balance what a normalization gives: its own scale and bias take it, every reader's weight takes it back."""
    channels = shape_of(node)[-1]
    if is_rms_norm_module(search.graph_module, node):
        raise Unbalanced("it is a module of torch.nn, RMSNorm, which stays one")
    if not normalizes(search.graph_module, node, Channels(-1)):
        raise Unbalanced("it normalizes more than the last dimension, or with weights that are computed")
    readers = _columns(search.all_of(node, scaled=False))
    shifts = call_name(node) == "layer_norm"
    return _place("norm", (Rows(node, torch.arange(channels)),), readers, channels, (name_of(node),), shifts)


def _value(search: Readers, node: Node) -> Place:
    """Balance the values of attention: rows of a linear layer give them, columns of the next one take that back."""
    reader = search.operand(node, 1, scaled=False, what="values")
    numbers = reader.numbers[..., :1, :]
    if not torch.equal(numbers.expand_as(reader.numbers), reader.numbers):
        raise Unbalanced("its values have their channels elsewhere than in the last dimension")
    mine = distinct(numbers)
    behind = readers_of(search.graph_module, node, numbers.expand(shape_of(node)).contiguous(), scaled=False)
    readers = [Columns(c.node, torch.searchsorted(mine, c.numbers.double())) for c in _columns(behind)]
    shifts = rows_sum_to_one(search.graph_module, node) is True
    writer = written_by(search.graph_module, cast("Node", node.args[1]))
    rows = (_rows(writer, mine, torch.arange(len(mine))),)
    return _place("value", rows, readers, len(mine), (name_of(writer),), shifts, at=site(name_of(node), "rhs"))


def _key(search: Readers, node: Node) -> Place:
    """Balance keys against queries: what keys are divided by, queries are multiplied with."""
    query, from_query, met = search.mixed_operand(node, 0, "queries")
    key, from_key, met_keys = search.mixed_operand(node, 1, "keys")
    of_query, of_key = met.firsts(query.numbers), met_keys.firsts(key.numbers)
    q, k = of_query[..., :1, :], of_key[..., :, :1]
    if not torch.equal(q.expand_as(of_query), of_query) or not torch.equal(k.expand_as(of_key), of_key):
        raise Unbalanced("its operands have their channels elsewhere than in the dimension that is summed")
    q, k = q.squeeze(-2), k.squeeze(-1)
    shape = torch.broadcast_shapes(q.shape, k.shape)  # type: ignore[no-untyped-call]
    paired = Groups()  # of keys, and of queries below zero
    paired.join(-1 - q.expand(shape), k.expand(shape))
    queries, keys = met.all_of(q, shape_of(from_query)[-1]), met_keys.all_of(k, shape_of(from_key)[-1])
    together, group = torch.unique(paired.firsts(met_keys.firsts(keys)), return_inverse=True)
    first = torch.full((len(together),), len(keys)).scatter_reduce_(0, group, torch.arange(len(keys)), "amin")
    group_of_query = torch.searchsorted(together, paired.firsts(-1 - met.firsts(queries)))
    rows = (
        _rows(from_key, keys, torch.arange(len(keys))),
        _rows(from_query, queries, first[group_of_query], times=True),
    )
    names, is_moved = (name_of(from_key), name_of(from_query)), query.is_moved and key.is_moved
    shifts = is_moved and shifts_keys(search.graph_module, node)
    place = _place("key", rows, [], len(keys), names, shifts, at=site(name_of(node), "rhs"))
    alike = () if len(together) == len(keys) else tuple(first[group].tolist())
    return replace(place, balance=replace(place.balance, alike=alike))


def _gate(search: Readers, node: Node) -> Place:
    """Balance the linear factor of a gated unit, silu(a) * b: the next layer's weight takes its scale back."""
    gate = written_by(search.graph_module, cast("Node", node.args[0]))
    factors = _factors_of_gate(search.graph_module, gate)
    reasons = []
    for writer, place in factors:
        try:
            reader = search.of(writer, gate, place, scaled=False, what="gated values")
            break
        except Unbalanced as reason:
            reasons.append(str(reason))
    else:
        raise Unbalanced(reasons[0])
    if reader.numbers.shape != shape_of(gate) or reader.along_last() is None:
        raise Unbalanced("its gate has another shape")
    mine = distinct(reader.numbers)
    behind = _columns(readers_of(search.graph_module, gate, reader.numbers, scaled=False))
    readers = [Columns(c.node, torch.searchsorted(mine, c.numbers.double())) for c in behind]
    rows = (_rows(writer, mine, torch.arange(len(mine))),)
    return _place("gate", rows, readers, len(mine), (name_of(writer),), False, at=site(name_of(node), "lhs"))


_FINDERS = {"norm": _norm, "value": _value, "key": _key, "gate": _gate}


def _place(
    kind: BalanceKind,
    writers: tuple[Rows, ...],
    readers: Iterable[Columns],
    channels: int,
    names: tuple[str, ...],
    shifts: bool,
    at: str | None = None,
) -> Place:
    readers = tuple(readers)
    planned = [name for c in readers if (name := planned_product(c.node)) is not None]
    if kind != "key" and not planned:
        raise Unbalanced("nothing that reads it is quantized")
    for writer in writers:
        if kind != "norm" and planned_product(writer.node) is None:
            raise Unbalanced(f"{name_of(writer.node)} is not quantized, so that nothing observes it")
    shifts = shifts and all(kind_of(c.node) == "linear" for c in readers)  # a product without a bias takes none back
    balance = Balance(
        kind, at or site(planned[0], "lhs"), names, tuple(name_of(c.node) for c in readers), channels, shifts
    )
    return Place(balance, writers, readers)


def _rows(writer: Node, mine: Tensor, channels: Tensor, *, times: bool = False) -> Rows:
    numbers = torch.full((shape_of(writer)[-1],), -1)
    numbers[mine.long()] = channels
    return Rows(writer, numbers, times)


def _columns(readers: Iterable[Reader]) -> list[Columns]:
    """Return the columns that read channels; raises Unbalanced if something else than a product with a weight does."""
    found = []
    for reader in readers:
        node = reader.node
        if node.op == "output":
            raise Unbalanced("the model returns it")
        has_weight = (
            kind_of(node) in ("linear", "matmul") and is_stored(node.args[1]) and len(shape_of(node.args[1])) == 2
        )
        if not has_weight or node.args[0] is not reader.value or not has_constant_bias(node):
            raise Unbalanced(f"{node.name} reads it, which is no product with a stored weight")
        numbers = reader.along_last()
        if numbers is None:
            raise Unbalanced(f"{node.name} reads its channels mixed with tokens")
        found.append(Columns(node, numbers))
    if not found:
        raise Unbalanced("nothing reads it")
    return found


def _factors_of_gate(graph_module: GraphModule, node: Node) -> list[tuple[Node, int]]:
    """Return the linear layers whose values a product element by element multiplies, and as which operand."""
    if node.target not in MULTIPLICATIONS or len(node.args) != 2 or not all(is_tensor(x) for x in node.args):
        return []
    if any(is_stored(x) for x in node.args) or node.args[0] is node.args[1]:
        return []
    writers = [(written_by(graph_module, cast("Node", x)), place) for place, x in enumerate(node.args)]
    return [(writer, place) for writer, place in writers if kind_of(writer) == "linear"]
