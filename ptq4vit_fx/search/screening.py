"""Which candidates to evaluate: those that were promising on a coarse grid, on fewer rows, or in the round before.

A table is a tensor (candidates, heads, columns) of distances, infinite where a candidate was not evaluated. Every
scale has its own distances and its own promising candidates; one evaluation serves all scales, each with its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_fx.search.candidates import Candidates
from ptq4vit_fx.search.distances import Evaluation

#: Without a prior table, every COARSE_STRIDE-th candidate is evaluated, and then the promising ones in between.
COARSE_STRIDE = 6
#: Promising candidates that are evaluated in any case: they tell how far the expectation can be trusted.
FIRST_FEW = 6
#: How much luckier than the luckiest one so far a candidate may be, in distances of that one from the average.
MARGIN = 2.0
#: Where the best candidate has unknown neighbours, this many of them are looked at on each side.
REACH = 2


def evaluate_all(evaluation: Evaluation) -> Tensor:
    """Return the table of every candidate."""
    return evaluation(_same_for_all(evaluation.searched, range(evaluation.searched.count)))


def screen(evaluation: Evaluation, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a table of the candidates that may be the best, and what to expect of all of them.

    prior: the expected distances, from elsewhere.
    """
    candidates = evaluation.searched
    if not candidates.ordered or candidates.count <= 4 * COARSE_STRIDE:
        table = evaluate_all(evaluation)
        return table, table
    shape = (candidates.count, candidates.groups.heads, candidates.groups.columns)
    table = torch.full(shape, torch.inf, dtype=torch.float64)
    if prior is None:
        coarse = range(COARSE_STRIDE - 1, candidates.count, COARSE_STRIDE)
        table[coarse] = evaluation(_same_for_all(candidates, coarse))
    expected = _interpolate(table) if prior is None else prior
    _evaluate_promising(evaluation, table, expected)
    while _explore(evaluation, table):
        pass
    known = table.isfinite()
    error = torch.where(known, table - expected, 0.0).sum(0) / known.sum(0)
    return table, torch.where(known, table, expected + error)


def best_of(table: Tensor) -> Tensor:
    """Return per scale the candidate with the smallest distance; the first one wins a tie."""
    return table.argmin(0)


def leaders(table: Tensor, count: int) -> Tensor:
    """Return per scale the `count` candidates with the smallest distances, best first: (count, heads, columns)."""
    return table.argsort(dim=0, stable=True)[:count]


def _evaluate_promising(evaluation: Evaluation, table: Tensor, expected: Tensor) -> None:
    """Evaluate what the table lacks, the candidate with the smallest expected distance of each scale first.

    A candidate's luck is how far its distance is below the expected one. A scale is done when none of its candidates
    would win even if it were as much luckier than the luckiest one so far as that one is than the average: a smooth
    landscape needs few evaluations, a rough one many.
    """
    hoped, order = expected.masked_fill(table.isfinite(), torch.inf).sort(dim=0, stable=True)
    best, luckiest = table.amin(0), torch.full_like(expected[0], torch.inf)
    total = torch.zeros_like(luckiest)
    heads, columns = torch.arange(table.shape[1])[:, None], torch.arange(table.shape[2])  # that are not done
    rank = 0
    while rank < len(table):
        following = rank + evaluation.at_once
        indices = order[rank:following]
        distance = evaluation(indices)
        table[indices, heads, columns] = distance
        best = torch.minimum(best, distance.amin(0))
        luck = distance - hoped[rank:following]
        luckiest = torch.minimum(luckiest, luck.amin(0))
        total += luck.sum(0)
        rank = following
        if rank >= len(table):
            return
        if rank < FIRST_FEW:
            continue
        still = (hoped[rank] + luckiest + MARGIN * (luckiest - total / rank) <= best).any(0)
        count = int(still.sum())
        if not count:
            return
        if 2 * count <= len(columns) and (narrower := evaluation.narrow(still.nonzero()[:, 0])) is not None:
            evaluation, columns = narrower, columns[still]
            hoped, order = hoped[..., still], order[..., still]
            best, luckiest, total = best[:, still], luckiest[:, still], total[:, still]


def _explore(evaluation: Evaluation, table: Tensor) -> bool:
    """Evaluate the unknown neighbours of the best candidates; return whether there were any."""
    last = len(table) - 1
    best = table.argmin(0)
    beside = torch.stack([best - 1, best + 1]).clamp(0, last)
    unknown = table.gather(0, beside).isinf().any(0).any(0)
    columns = unknown.nonzero()[:, 0]
    if not len(columns):
        return False
    narrower = evaluation.narrow(columns) if len(columns) < len(unknown) else None
    if narrower is None:
        columns = torch.arange(len(unknown))
    offsets = torch.tensor([sign * distance for distance in range(1, REACH + 1) for sign in (-1, 1)])
    indices = (best[:, columns] + offsets.view(-1, 1, 1)).clamp(0, last)
    table[indices, torch.arange(table.shape[1])[:, None], columns] = (narrower or evaluation)(indices)
    return True


def _same_for_all(candidates: Candidates, numbers: range) -> Tensor:
    """Return indices (count, heads, columns) that take each of the candidates for every scale."""
    shape = (len(numbers), candidates.groups.heads, candidates.groups.columns)
    return torch.tensor(numbers).view(-1, 1, 1).expand(shape)


def _interpolate(table: Tensor) -> Tensor:
    """Fill unknown distances linearly from the known neighbours, at the ends with the nearest known one."""
    known = table.isfinite()
    index = torch.arange(len(table)).view(-1, 1, 1).expand_as(table)
    last = len(table) - 1
    before = torch.where(known, index, -1).cummax(0)[0]
    after = torch.where(known, index, last + 1).flip(0).cummin(0)[0].flip(0)
    before, after = torch.where(before < 0, after, before), torch.where(after > last, before, after)
    low, high = table.gather(0, before), table.gather(0, after)
    share = (index - before).double() / (after - before).clamp_min(1)
    return low + (high - low) * share
