"""Balances: channels that are scaled and shifted where one layer writes them and back where others read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ptq4vit_fx.inputs.records import Place
from ptq4vit_fx.names import Site, stored

#: Behind a normalization; values of attention; keys against queries; the linear half of a gated unit; between
#: convolutions; in front of a depthwise one.
BalanceKind = Literal["norm", "value", "key", "gate", "convolution", "depthwise"]

#: Largest and smallest scale that a file may hold.
LARGEST_SCALE = 2.0**40

#: A range below this share of the mean counts as so much: a constant channel needs no steps of its own.
LEAST_RANGE = 1e-3


@dataclass(frozen=True)
class Balance:
    """Channels x that a writer gives as x' = (x - shift) / scale; every reader takes that back in its weight.

    name: the site that reads them first. writers: the normalization (its path) or the product whose rows are changed;
    of a key, the queries' behind the keys'; none of what is divided in front of its reader. readers: the products whose
    weights take it back; of a key none, as (k - m) / t meets q * t, and softmax does not see what all keys of a query
    have in common. channels: how many. shifts: whether a shift leaves the function as it is: not through a gate, an
    RMSNorm, ReLU, or rows that do not sum to 1. alike: of each channel, the first one of those that have to have its
    scale, as rotary embeddings add queries, and keys, in pairs; () where each stands alone.
    Sources: RepQ-ViT (scales behind LayerNorm); cross-layer equalization (scales through ReLU, Nagel et al. 2019,
    https://arxiv.org/abs/1906.04721); shifts instead of zero points are ours.
    """

    kind: BalanceKind
    name: Site
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: int
    shifts: bool
    alike: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChannelAffine:
    """The numbers of a balance: x' = (x - shift) / scale, float32 (channels,) both."""

    scale: Tensor
    shift: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in a file."""
        return {"balance_scale": self.scale, "balance_shift": self.shift}

    def to(self, device: torch.device) -> ChannelAffine:
        """Return it on another device."""
        return ChannelAffine(self.scale.to(device), self.shift.to(device))


def balanced_ranges(low: Tensor, high: Tensor, exponent: float, *, shifts: bool) -> ChannelAffine:
    """Return what brings ranges (channels,) nearer to each other: scale (w / mean(w))^exponent, shift (low + high) / 2.

    w is the range, or twice the largest magnitude where nothing is shifted.
    """
    low, high = low.double(), high.double()
    shift = (low + high) / 2 if shifts else torch.zeros_like(low)
    width = 2 * torch.maximum(high - shift, shift - low)
    return ChannelAffine(_relative(width).pow(exponent).float(), shift.float())


def matched_ranges(query: Tensor, low: Tensor, high: Tensor, exponent: float, *, shifts: bool) -> ChannelAffine:
    """Return what brings the ranges of keys and queries nearer to each other, channel by channel.

    query: the largest magnitudes of the queries, (channels,); low, high: of the keys. The scale is
    (w_k / w_q)^(exponent / 2), its geometric mean 1: keys are divided by it, queries are multiplied with it.
    """
    keys = balanced_ranges(low, high, 1.0, shifts=shifts)
    ratio = (keys.scale.double() / _relative(2 * query.double())).pow(exponent / 2)
    return ChannelAffine((ratio / ratio.log().mean().exp()).float(), keys.shift)


def shrunk_ranges(low: Tensor, high: Tensor, exponent: float, minimum: float) -> ChannelAffine:
    """Return what divides the wider channels alone, so that none goes farther than `minimum` below zero if none did.

    The scale is max(1, w / r)^exponent, w the largest magnitude of a channel. A grid from -minimum to r has steps in
    proportion to r + minimum: r is the range that makes the sum of their squares over all channels, each in its own
    units, least. No channel counts for less than the minimum.
    """
    width = torch.maximum(high, -low).double()
    width = torch.maximum(width, (width.mean() * LEAST_RANGE).clamp_min(minimum))
    if not float(width.max()):
        return ChannelAffine(torch.ones_like(low), torch.zeros_like(low))
    steps = (width[:, None] + minimum) / torch.minimum(width[:, None], width)  # of each r, in units of each channel
    best = width[steps.square().sum(1).argmin()]
    return ChannelAffine((width / best).clamp_min(1.0).pow(exponent).float(), torch.zeros_like(low))


def _relative(width: Tensor) -> Tensor:
    """Return ranges over their mean, none below LEAST_RANGE; all 1 where everything is constant."""
    mean = width.mean()
    return (width / mean).clamp_min(LEAST_RANGE) if mean > 0 else torch.ones_like(width)


def balances_of(
    planned: Iterable[Balance], tensors: Mapping[str, Tensor], place: Place
) -> tuple[dict[Site, ChannelAffine], dict[str, Tensor]]:
    """Return the numbers of the planned balances that a file has tensors of, and its other tensors."""
    left, found = dict(tensors), {}
    for balance in planned:
        both = [left.pop(stored(balance.name, role), None) for role in ("balance_scale", "balance_shift")]
        scale, shift = both
        if scale is not None and shift is not None:
            found[balance.name] = ChannelAffine(scale, shift)
        elif scale is not None or shift is not None:
            raise place.at(balance.name).refusal("scales and shifts of a balance", "one of them alone")
    return found, left


def check_balances(planned: Iterable[Balance], balances: Mapping[Site, ChannelAffine], place: Place) -> None:
    """Raise PTQError unless every balance is planned, and has positive scales and finite shifts, one per channel."""
    known = {balance.name: balance for balance in planned}
    for name, own in balances.items():
        here = place.at(name)
        if name not in known:
            raise here.refusal("a balance of the plan beside it", "another")
        shape = (known[name].channels,)
        for role, x in own.tensors().items():
            if x.dtype != torch.float32 or x.shape != shape or not bool(x.isfinite().all()):
                got = f"{x.dtype}, shape {tuple(x.shape)}" + ("" if bool(x.isfinite().all()) else ", not finite")
                raise here.at(role).refusal(f"finite float32 numbers of shape {shape}", got)
        if not bool(((own.scale >= 1 / LARGEST_SCALE) & (own.scale <= LARGEST_SCALE)).all()):
            raise here.at("balance_scale").refusal("scales from 2^-40 to 2^40", "others")
        alike = list(known[name].alike)
        if alike and not torch.equal(own.scale, own.scale[alike]):
            raise here.at("balance_scale").refusal("one scale for channels that are added to each other", "several")
        if not known[name].shifts and bool((own.shift != 0).any()):
            raise here.at("balance_shift").refusal("zeros, as a shift would change the function", "others")
