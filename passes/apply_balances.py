"""Scale and shift channels where they are written, and take that back where they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.balances import ChannelAffine
from ptq4vit_fx.names import Site
from ptq4vit_fx.passes.graph.balance_places import Columns, Rows, balance_places
from ptq4vit_fx.passes.graph.channels import is_observer
from ptq4vit_fx.passes.graph.contract import calibration_of, graph_pass, plan_of
from ptq4vit_fx.passes.graph.dataflow import get_attribute, is_stored, stored_path
from ptq4vit_fx.passes.graph.marks import kind_of, planned_product, scope_of
from ptq4vit_fx.passes.graph.norms import arguments_of
from ptq4vit_fx.passes.graph.rewriter import Writer
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.graph.stored_tensors import overwrite, reads_of


@graph_pass(before=Stage.OBSERVED, after=Stage.OBSERVED)
def apply_balances(graph_module: GraphModule, numbers: Mapping[Site, ChannelAffine] | None = None) -> int:
    """Change the weights of every balance of the plan; the float function stays what it is, but for rounding.

    numbers: of each balance; by default those of the calibration that is set on the graph. Computed in float64.
    """
    if numbers is None:
        calibration = calibration_of(graph_module)
        assert calibration is not None
        numbers = calibration.balances
    if not numbers:
        return 0
    places, _ = balance_places(graph_module, plan_of(graph_module).transforms)
    for place in places:
        affine = numbers[place.balance.name]
        scale, shift = affine.scale.double().cpu(), affine.shift.double().cpu()
        for columns in place.readers:
            _take_back(graph_module, columns, scale, shift)
        for rows in place.writers:
            if kind_of(rows.node) is None:
                _balance_norm(graph_module, rows.node, scale, shift)
            else:
                _balance_rows(graph_module, rows, scale, shift)
    return len(places)


def _take_back(graph_module: GraphModule, columns: Columns, scale: Tensor, shift: Tensor) -> None:
    """x = scale x' + shift, so W x + b = (W diag(scale)) x' + (b + W shift)."""
    node, is_linear = columns.node, kind_of(columns.node) == "linear"
    stored = _stored(graph_module, node.args[1])
    weight = stored if is_linear else stored.T  # (out, in)
    changed = weight * scale[columns.numbers]
    if bool((shift != 0).any()):
        assert is_linear
        added = weight @ shift[columns.numbers]
        bias = node.args[2]
        _store(graph_module, node, 2, added if bias is None else _stored(graph_module, bias) + added, "bias")
    _store(graph_module, node, 1, changed if is_linear else changed.T, "weight")


def _balance_rows(graph_module: GraphModule, rows: Rows, scale: Tensor, shift: Tensor) -> None:
    """Give (x - shift) / scale, or scale x, in the rows that have a channel."""
    node, mine = rows.node, rows.numbers >= 0
    factor, less = torch.ones(len(mine), dtype=torch.float64), torch.zeros(len(mine), dtype=torch.float64)
    factor[mine] = scale[rows.numbers[mine]] if rows.times else 1 / scale[rows.numbers[mine]]
    if not rows.times:
        less[mine] = shift[rows.numbers[mine]]
    weight, bias = _stored(graph_module, node.args[1]), node.args[2]
    _store(graph_module, node, 1, weight * factor[:, None], "weight")
    if bias is not None or bool((less != 0).any()):
        own = torch.zeros_like(less) if bias is None else _stored(graph_module, bias)
        _store(graph_module, node, 2, (own - less) * factor, "bias")


def _balance_norm(graph_module: GraphModule, node: Node, scale: Tensor, shift: Tensor) -> None:
    call = arguments_of(node)
    node.args, node.kwargs = (call.pop("input"), call.pop("normalized_shape")), call
    weight, bias = call.get("weight"), call.get("bias")
    one = torch.ones_like(scale) if weight is None else _stored(graph_module, weight)
    _store(graph_module, node, "weight", one / scale, "weight")
    if bias is not None or bool((shift != 0).any()):
        zero = torch.zeros_like(shift) if bias is None else _stored(graph_module, bias)
        _store(graph_module, node, "bias", (zero - shift) / scale, "bias")


def _stored(graph_module: GraphModule, node: object) -> Tensor:
    """Return the value of a stored operand in float64, on the CPU."""
    return cast("Tensor", get_attribute(graph_module, stored_path(node))).detach().double().cpu()


def _store(graph_module: GraphModule, node: Node, place: int | str, value: Tensor, leaf: str) -> None:
    """Let an operand of a node be another tensor: under the name that it has if nothing else reads that."""
    old = node.kwargs.get(place) if isinstance(place, str) else node.args[place]
    observers = [user for user in node.users if is_observer(graph_module, user)]
    if is_stored(old):
        reads = reads_of(graph_module, get_attribute(graph_module, stored_path(old)))
        if all(read.users.keys() <= {node, *observers} for read in reads):
            overwrite(graph_module, reads, value)
            return
    device = next((p.device for p in graph_module.parameters()), torch.device("cpu"))
    new = value.float().contiguous().to(device)
    name = planned_product(node) or scope_of(node) or node.name
    (held,) = Writer(node, scope=f"{name}_balanced_{leaf}").hold({leaf: new})
    if isinstance(place, str):
        node.update_kwarg(place, held)
        return
    node.update_arg(place, held)
    for observer in observers:
        observer.update_arg(place, held)
