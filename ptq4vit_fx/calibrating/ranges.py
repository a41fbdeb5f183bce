"""Ranges of channels on the calibration images, and the balances that follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.balances import ChannelAffine, balanced_ranges, matched_ranges
from ptq4vit_fx.calibrating.capture import check_finite, recording
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.names import Site
from ptq4vit_fx.passes.graph.balance_places import FIELDS, Columns, Place, balance_places
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.marks import planned_product

#: This share of the values of a channel may lie outside of its range, on each side: single outliers do not count.
OUTSIDE = 0.0005


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
    places, _ = balance_places(prepared, plan_of(prepared).transforms)
    watched = _watched(places)
    extremes: dict[tuple[str, str], Extremes] = {}

    def record(name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        for what, x in (("lhs", lhs), ("out", out)):
            if (name, what) in watched:
                check_finite(f"{'input' if what == 'lhs' else 'output'} of {name}", x)
                rows = images * x[..., 0].numel() / images_now
                extremes.setdefault((name, what), Extremes(1 + int(OUTSIDE * rows))).add(x)
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
    found = set()
    for place in places:
        if place.balance.kind in ("norm", "gate"):
            found.add((str(planned_product(_observed(place).node)), "lhs"))
        else:
            found.update((str(planned_product(rows.node)), "out") for rows in place.writers)
    return found


def _observed(place: Place) -> Columns:
    """Return the first reader of the channels that has an observer."""
    return next(columns for columns in place.readers if planned_product(columns.node) is not None)


def _affine(prepared: GraphModule, place: Place, extremes: dict[tuple[str, str], Extremes]) -> ChannelAffine:
    balance = place.balance
    exponent = getattr(plan_of(prepared).transforms, FIELDS[balance.kind])
    if balance.kind in ("norm", "gate"):
        reader = _observed(place)
        seen = extremes[str(planned_product(reader.node)), "lhs"]
        low, high = _per_channel(seen.ends(), reader.numbers, balance.channels)
        return balanced_ranges(low, high, exponent, shifts=balance.shifts)
    ranges = [
        _per_channel(extremes[str(planned_product(rows.node)), "out"].ends(), rows.numbers, balance.channels)
        for rows in place.writers
    ]
    if balance.alike:
        ranges = [_joined(ends, torch.tensor(balance.alike)) for ends in ranges]
    low, high = ranges[0]
    if balance.kind == "value":
        return balanced_ranges(low, high, exponent, shifts=balance.shifts)
    query = torch.maximum(ranges[1][1], -ranges[1][0])
    return matched_ranges(query, low, high, exponent, shifts=balance.shifts)


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
