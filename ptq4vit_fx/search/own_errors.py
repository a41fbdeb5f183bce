"""What a candidate does to its operand alone, whatever it is multiplied with: a place to start, and the last word.

Alternating searches stay in the basin of the product's distance where they start, and a basin can be a bad one: beside
a softmax that has lost its small values, the best v is one that makes up for them, and beside that v they stay lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_fx.search.candidates import Candidates
from ptq4vit_fx.search.distances import make_evaluation
from ptq4vit_fx.search.landscape import Choice, Landscape
from ptq4vit_fx.search.strategies import SEARCH_ORDER

#: Elements of an operand, and of each of its columns with a scale, on which the errors of all candidates are compared.
ELEMENTS, COLUMN_ELEMENTS = 1 << 13, 16
#: An operand must not keep an error of its own that could be so much smaller at an equal distance of the product.
MUCH_SMALLER = 0.1
#: Distances count as equal up to this share: far less than what one local minimum differs from the next.
EQUAL = 0.01
#: So many of the candidates with a much smaller error are tried.
TRIED = 8


def own_best(landscape: Landscape) -> Choice:
    """Return the choice where every scale is the one of least squared error of its own operand."""
    return {
        operand: own_errors(candidates, landscape.product.operand(operand)).argmin(0)
        for operand, candidates in landscape.candidates.items()
    }


def own_errors(candidates: Candidates, x: Tensor) -> Tensor:
    """Return the squared error of every candidate on evenly spread elements of its operand: (count, heads, columns).

    x: the operand, (batch, heads, i, j); whole vectors along j are taken.
    """
    x = _spread(x, candidates.groups.columns).unsqueeze(2)
    every = torch.arange(candidates.count).view(-1, 1, 1)
    indices = every.expand(-1, candidates.groups.heads, candidates.groups.columns)
    error = candidates.fake_quantize(x, indices, 2).sub_(x).square_()  # (batch, heads, count, i, j)
    return candidates.groups.reduce(error.sum((0, 3), dtype=torch.float64).transpose(0, 1)).cpu()


def settle(landscape: Landscape, choice: Choice) -> Choice:
    """Return the choice, without a scale whose operand could have a tenth of its error at an equal distance.

    Where the product's distance says nothing of an operand (no gradient reaches it, the other operand is zero there),
    any of its scales is as good; other images may read what these do not.
    """
    for operand in SEARCH_ORDER:
        candidates, x = landscape.candidates[operand], landscape.product.operand(operand)
        errors = own_errors(candidates, x)
        chosen = choice[operand]
        limit = MUCH_SMALLER * errors.gather(0, chosen.clamp_max(candidates.count - 1)[None])[0]
        if not bool((errors.amin(0) < limit).any()):
            continue
        order = errors.argsort(dim=0, stable=True)
        counts = (errors < limit).sum(0)  # how many leaders of each scale are much better
        ranks = torch.arange(TRIED).view(-1, 1, 1) * counts // TRIED
        tried = torch.where(counts > 0, order.gather(0, ranks), chosen)
        distances = make_evaluation(landscape, operand, choice)(torch.cat([chosen[None], tried]))
        nearest, position = distances[1:].min(0)
        better = (counts > 0) & (nearest <= (1 + EQUAL) * distances[0])
        replacement = torch.where(better, tried.gather(0, position[None])[0], chosen)
        smaller = _error(candidates, x, replacement) < MUCH_SMALLER * _error(candidates, x, chosen)
        if bool((smaller & (replacement != chosen)).any()):
            choice = choice | {operand: torch.where(smaller, replacement, chosen)}
    return choice


def _error(candidates: Candidates, x: Tensor, indices: Tensor) -> Tensor:
    """Return the squared error of one choice: float64 (heads, columns), on the CPU."""
    error = candidates.fake_quantize(x, indices).sub_(x).square_()
    return candidates.groups.reduce(error.sum((0, 2), dtype=torch.float64)).cpu()


def _spread(x: Tensor, columns: int) -> Tensor:
    """Return every n-th image and row of an operand, so that as many elements are left as the scales need."""
    batch, heads, rows, inner = x.shape
    wanted = max(1, max(ELEMENTS, COLUMN_ELEMENTS * columns) // (heads * inner))  # vectors along the last dimension
    images = min(batch, max(1, wanted // COLUMN_ELEMENTS))
    each = min(rows, max(1, wanted // images))
    return x[:: max(1, batch // images), :, :: max(1, rows // each)]
