"""Ranges of channels on the calibration images, and the balances that follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.activations import NEGATIVE_RANGE
from ptq4vit_fx.balances import ChannelAffine, balanced_ranges, matched_ranges, shrunk_ranges
from ptq4vit_fx.calibrating.capture import check_finite, recording
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.names import Site
from ptq4vit_fx.passes.graph.balanced_layers import FIELDS, Columns, Place, marked_places
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.marks import planned_product

#: This share of the values of a channel may lie outside of its range, on each side: single outliers do not count.
OUTSIDE = 0.0005
#: Kinds of balances whose channels are measured where they are read, the others where they are written.
MEASURED_AS_READ = ("norm", "gate", "convolution", "depthwise")


@dataclass
class Extremes:
    """The largest and smallest values so far of every channel, (kept, channels) each, and how many there were."""

    kept: int
    low: Tensor | None = None
    high: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """See more values: (..., channels)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        low = rows if self.low is None else torch.cat([self.low, rows.topk(min(self.kept, len(rows)), 0, False)[0]])
        high = rows if self.high is None else torch.cat([self.high, rows.topk(min(self.kept, len(rows)), 0)[0]])
        self.low = low.topk(min(self.kept, len(low)), 0, False)[0]
        self.high = high.topk(min(self.kept, len(high)), 0)[0]

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the low and the high end of every channel."""
        assert self.low is not None
        assert self.high is not None
        return self.low[-1].cpu(), self.high[-1].cpu()


def measure_balances(prepared: GraphModule, batches: Iterable[Inputs], images: int) -> dict[Site, ChannelAffine]:
    """Return the numbers of every balance of the plan, from one forward of the prepared model per batch.

    images: how many there are in all batches.
    """
    places = marked_places(prepared.graph, plan_of(prepared).balances)
    watched = _watched(places)
    convolutions = {op.name for op in plan_of(prepared).ops if op.kind == "conv2d"}
    extremes: dict[tuple[str, str], Extremes] = {}

    def record(name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        for what, x in (("lhs", lhs), ("out", out)):
            if (name, what) in watched:
                check_finite(f"{'input' if what == 'lhs' else 'output'} of {name}", x)
                values = x.movedim(-3, -1) if name in convolutions else x
                rows = images * values[..., 0].numel() / images_now
                extremes.setdefault((name, what), Extremes(1 + int(OUTSIDE * rows))).add(values)
        return out

    images_now = 1
    with recording(prepared, {name for name, _ in watched}, record), torch.no_grad():
        for batch in batches:
            images_now = len(batch[0])
            with exclusive():
                prepared(*batch)
    return {place.balance.name: _affine(prepared, place, extremes) for place in places}


def _watched(places: Iterable[Place]) -> set[tuple[str, str]]:
    """Return which operand or output of which product shows the channels of each place."""
    found: set[tuple[str, str]] = set()
    for place in places:
        if place.balance.kind in MEASURED_AS_READ:
            found.update((str(planned_product(columns.node)), "lhs") for columns in _observed(place))
        else:
            found.update((str(planned_product(rows.node)), "out") for rows in place.writers)
    return found


def _observed(place: Place) -> list[Columns]:
    """Return the readers of the channels that show them: those with an observer; one, where all read the same."""
    found = [columns for columns in place.readers if planned_product(columns.node) is not None]
    return found if place.balance.kind == "convolution" else found[:1]


def _affine(prepared: GraphModule, place: Place, extremes: dict[tuple[str, str], Extremes]) -> ChannelAffine:
    balance = place.balance
    exponent = getattr(plan_of(prepared).transforms, FIELDS[balance.kind])
    what, layers = ("lhs", _observed(place)) if balance.kind in MEASURED_AS_READ else ("out", place.writers)
    ranges = [
        _per_channel(extremes[str(planned_product(layer.node)), what].ends(), layer.numbers, balance.channels)
        for layer in layers
    ]
    if balance.alike:
        ranges = [_joined(ends, torch.tensor(balance.alike)) for ends in ranges]
    low, high = ranges[0]
    if balance.kind == "key":
        query = torch.maximum(ranges[1][1], -ranges[1][0])
        return matched_ranges(query, low, high, exponent, shifts=balance.shifts)
    if balance.kind == "depthwise":
        source = plan_of(prepared).op(balance.readers[0]).lhs_source
        return shrunk_ranges(low, high, exponent, 0.0 if source is None else NEGATIVE_RANGE[source])
    for other in ranges[1:]:
        low, high = torch.minimum(low, other[0]), torch.maximum(high, other[1])
    seen = low <= high  # a channel that only float products read has no range
    affine = balanced_ranges(low.where(seen, 0.0), high.where(seen, 0.0), exponent, shifts=balance.shifts)
    return ChannelAffine(affine.scale.where(seen, 1.0), affine.shift)


def _per_channel(ends: tuple[Tensor, Tensor], numbers: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return the range of each channel, (channels,), of the ranges of entries that have these channels, or -1."""
    low, high = ends
    mine = numbers >= 0
    own = numbers[mine]
    lowest = torch.full((channels,), torch.inf).scatter_reduce_(0, own, low[mine].float(), "amin")
    highest = torch.full((channels,), -torch.inf).scatter_reduce_(0, own, high[mine].float(), "amax")
    return lowest, highest


def _joined(ends: tuple[Tensor, Tensor], firsts: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each channel the range of all channels with its first one."""
    low, high = ends
    lowest, highest = low.scatter_reduce(0, firsts, low, "amin"), high.scatter_reduce(0, firsts, high, "amax")
    return lowest[firsts], highest[firsts]
