"""Orthogonal matrices R with R 1 = 1, as stages of small reflections: the same bits on every machine.

A reflection of m channels, x -> (2 / m) (x 1) 1 - x, is orthogonal, keeps the vector of ones, and spreads each channel
over all m; that of four is half of a regular Hadamard matrix (all entries +-1/2). Where the width is a product of small
factors, one reflection along each factor, as in a fast Hadamard transform, spreads every channel over all others: for
4^k channels all entries of R are +-2^-k. Other widths take rounds of reflections of four channels, drawn anew each. The
seed draws the order of the channels. Nothing is multiplied as a matrix, and sums are taken in one order: which machine
or how many threads rotate a weight does not show in it, so its fingerprint stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Factors of widths; 4 first, whose reflection spreads a channel evenly.
FACTORS = (4, 3, 5, 7)
#: Rounds for other widths, beside those that would reach every channel if none met twice.
MORE_ROUNDS = 4


@dataclass(frozen=True)
class Rotation:
    """Stages of an R: each takes the channels in an order, and reflects groups of `size` neighbours, as many as fit."""

    orders: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    def turn(self, x: Tensor, dim: int, blocks: int = 1) -> Tensor:
        """Return x R along a dimension that holds `blocks` times all channels, each rotated alone; float64."""
        rows = x.double().movedim(dim, -1)
        # Channels in front: what is then taken in another order are whole rows.
        turned = rows.reshape(-1, blocks, rows.shape[-1] // blocks).movedim(-1, 0).contiguous()
        for order, size in zip(self.orders, self.sizes, strict=True):
            turned = _reflected(turned[order], size)
        return turned.movedim(0, -1).contiguous().reshape(rows.shape).movedim(-1, dim)


def rotation(width: int, seed: int) -> Rotation:
    """Return an R of `width` channels, drawn by a seed."""
    generator = torch.Generator().manual_seed(seed)
    factors = _factors(width)
    if factors is None:
        rounds = math.ceil(math.log(width, 4)) + MORE_ROUNDS
        return Rotation(tuple(torch.randperm(width, generator=generator) for _ in range(rounds)), (4,) * rounds)
    first, last = (torch.randperm(width, generator=generator) for _ in range(2))
    # Behind the first stage the factor that was last is first: after all of them each was last once.
    shapes = [(*factors[place:], *factors[:place]) for place in range(len(factors))]
    cycles = [torch.arange(width).reshape(shape).movedim(0, -1).flatten() for shape in shapes]
    orders = (first[cycles[0]], *cycles[1:], last)
    return Rotation(orders, (*factors, 1))


def ordered_sum(x: Tensor) -> Tensor:
    """Return the sum along the last dimension, by halves: the order of the additions is that of no machine."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        added, rest = x[..., :half] + x[..., half : 2 * half], x[..., 2 * half :]
        x = torch.cat([added, rest], -1) if rest.shape[-1] else added
    return x[..., 0]


def _reflected(x: Tensor, size: int) -> Tensor:
    """Reflect groups of neighbours along the first dimension."""
    if size == 1:
        return x
    whole = len(x) // size * size
    groups = x[:whole].reshape(-1, size, *x.shape[1:])
    reflected = (ordered_sum(groups.movedim(1, -1))[:, None] * (2 / size) - groups).flatten(0, 1)
    return torch.cat([reflected, x[whole:]]) if whole < len(x) else reflected


def _factors(width: int) -> tuple[int, ...] | None:
    """Return small factors of a width, None if it has others: of two channels alone a reflection is a swap."""
    found, rest = [], width
    for factor in FACTORS:
        while rest % factor == 0:
            found.append(factor)
            rest //= factor
    if rest == 2 and found:
        place = found.index(3) if 3 in found else 0
        found[place] *= 2
        rest = 1
    return tuple(found) if rest == 1 and found else None
