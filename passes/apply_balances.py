"""Scale and shift channels where they are written, and take that back where they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.balances import ChannelAffine
from ptq4vit_fx.names import Site
from ptq4vit_fx.passes.graph.affine_norms import argument, opened_norm, parameters_of, place_of
from ptq4vit_fx.passes.graph.balanced_layers import Columns, Rows, marked_places
from ptq4vit_fx.passes.graph.channels import is_observer
from ptq4vit_fx.passes.graph.contract import calibration_of, graph_pass, plan_of
from ptq4vit_fx.passes.graph.dataflow import get_attribute, is_stored, stored_path
from ptq4vit_fx.passes.graph.marks import kind_of, planned_product
from ptq4vit_fx.passes.graph.rewriter import Writer
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.graph.stored_tensors import are_alone, overwrite, reads_of


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
    places = marked_places(graph_module.graph, plan_of(graph_module).balances)
    writers = dict.fromkeys(rows.node for place in places for rows in place.writers)
    opened = {node: opened_norm(graph_module, node) for node in writers}
    for place in places:
        affine = numbers[place.balance.name]
        scale, shift = affine.scale.double().cpu(), affine.shift.double().cpu()
        for columns in place.readers:
            _take_back(graph_module, columns, scale, shift)
            if place.balance.kind == "depthwise":
                _divide_in_front(graph_module, columns.node, scale)
        for rows in place.writers:
            _balance_rows(graph_module, replace(rows, node=opened[rows.node]), scale, shift)
    return len(places)


def _take_back(graph_module: GraphModule, columns: Columns, scale: Tensor, shift: Tensor) -> None:
    """x = scale x' + shift, so W x + b = (W diag(scale)) x' + (b + W shift)."""
    node, mine, kind = columns.node, columns.numbers >= 0, kind_of(columns.node)
    stored = _stored(graph_module, node.args[1])
    factor = torch.ones(len(mine), dtype=torch.float64)
    factor[mine] = scale[columns.numbers[mine]]
    if bool((shift != 0).any()):
        assert kind == "linear"
        added = stored @ shift[columns.numbers]
        bias = node.args[2]
        _store(graph_module, node, 2, added if bias is None else _stored(graph_module, bias) + added, "bias")
    _store(graph_module, node, 1, _with_columns(node, stored, factor), "weight")


def _divide_in_front(graph_module: GraphModule, node: Node, scale: Tensor) -> None:
    """Multiply what a convolution reads by 1 / scale, channel by channel, for it alone."""
    lhs = cast("Node", node.args[0])
    factor = (1 / scale).float().view(-1, 1, 1).to(_device(graph_module))
    write = Writer(node, scope=f"{planned_product(node)}_balanced_input")
    divided = write(torch.mul, lhs, *write.hold({"factor": factor}))
    for reader in (node, *(user for user in node.users if is_observer(graph_module, user))):
        reader.update_arg(0, divided)


def _with_columns(node: Node, weight: Tensor, factor: Tensor) -> Tensor:
    """Return a weight whose input channels are multiplied by factors."""
    if kind_of(node) != "conv2d":
        return weight * (factor if kind_of(node) == "linear" else factor[:, None])
    groups = cast("int", node.args[6])
    rows = factor.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)  # every group reads channels of its own
    return weight * rows.reshape(*weight.shape[:2], 1, 1)


def _balance_rows(graph_module: GraphModule, rows: Rows, scale: Tensor, shift: Tensor) -> None:
    """Give (x - shift) / scale, or scale x, in the rows that have a channel: of a product's weight, or of a norm's."""
    node, mine = rows.node, rows.numbers >= 0
    factor, less = torch.ones(len(mine), dtype=torch.float64), torch.zeros(len(mine), dtype=torch.float64)
    factor[mine] = scale[rows.numbers[mine]] if rows.times else 1 / scale[rows.numbers[mine]]
    if not rows.times:
        less[mine] = shift[rows.numbers[mine]]
    if kind_of(node) is None:
        _balance_norm(graph_module, node, factor, less)
        return
    weight, bias = _stored(graph_module, node.args[1]), node.args[2]
    _store(graph_module, node, 1, weight * factor.view(-1, *[1] * (weight.ndim - 1)), "weight")
    if bias is not None or bool((less != 0).any()):
        own = torch.zeros_like(less) if bias is None else _stored(graph_module, bias)
        _store(graph_module, node, 2, (own - less) * factor, "bias")


def _balance_norm(graph_module: GraphModule, node: Node, factor: Tensor, less: Tensor) -> None:
    weight = argument(node, "weight")
    one = torch.ones_like(factor) if weight is None else _stored(graph_module, weight)
    _store(graph_module, node, place_of(node, "weight"), one * factor, "weight")
    bias = argument(node, "bias") if "bias" in parameters_of(node) else None
    if bias is not None or bool((less != 0).any()):
        own = torch.zeros_like(less) if bias is None else _stored(graph_module, bias)
        _store(graph_module, node, place_of(node, "bias"), (own - less) * factor, "bias")


def _stored(graph_module: GraphModule, node: object) -> Tensor:
    """Return the value of a stored operand in float64, on the CPU."""
    return cast("Tensor", get_attribute(graph_module, stored_path(node))).detach().double().cpu()


def _store(graph_module: GraphModule, node: Node, place: int | str, value: Tensor, leaf: str) -> None:
    """Let an operand of a node be another tensor: under the name that it has if nothing else reads that."""
    old = node.kwargs.get(place) if isinstance(place, str) else node.args[place]
    observers = [user for user in node.users if is_observer(graph_module, user)]
    if is_stored(old):
        reads = reads_of(graph_module, get_attribute(graph_module, stored_path(old)))
        if are_alone(reads, {node, *observers}):
            overwrite(graph_module, reads, value)
            return
    new = value.float().contiguous().to(_device(graph_module))
    name = planned_product(node) or node.name
    (held,) = Writer(node, scope=f"{name}_balanced_{leaf}").hold({leaf: new})
    if isinstance(place, str):
        node.update_kwarg(place, held)
        return
    node.update_arg(place, held)
    for observer in observers:
        observer.update_arg(place, held)


def _device(graph_module: GraphModule) -> torch.device:
    return next((p.device for p in graph_module.parameters()), torch.device("cpu"))
