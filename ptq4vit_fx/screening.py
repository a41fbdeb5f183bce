"""Which candidates to evaluate: those that were promising on a coarse grid, on fewer rows, or in the round before.

A table is a tensor (candidates, heads, columns) of distances, infinite where a candidate was not evaluated. Every
scale has its own distances and its own promising candidates; one evaluation serves all scales, each with its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_fx.candidates import uniform_choice
from ptq4vit_fx.distances import Evaluation

#: Without a prior table, every COARSE_STRIDE-th candidate is evaluated, and then the promising ones in between.
COARSE_STRIDE = 6
#: Promising candidates that are evaluated in any case: they tell how far the expectation can be trusted.
FIRST_FEW = 6
#: Where the best candidate has unknown neighbours, this many of them are looked at on each side.
REACH = 4


def evaluate_all(evaluation: Evaluation) -> Tensor:
    """Return the table of every candidate."""
    candidates = evaluation.searched
    return torch.stack([evaluation(uniform_choice(candidates, number)) for number in range(candidates.count)])


def screen(evaluation: Evaluation, prior: Tensor | None) -> Tensor:
    """Return a table of the candidates that may be the best; prior: a table from elsewhere, without gaps or with."""
    candidates = evaluation.searched
    if not candidates.ordered or candidates.count <= 4 * COARSE_STRIDE:
        return evaluate_all(evaluation)
    shape = (candidates.count, candidates.groups.heads, candidates.groups.columns)
    table = torch.full(shape, torch.inf, dtype=torch.float64)
    if prior is None:
        for number in range(COARSE_STRIDE - 1, candidates.count, COARSE_STRIDE):
            table[number] = evaluation(uniform_choice(candidates, number))
    _evaluate_promising(evaluation, table, _interpolate(table if prior is None else prior))
    while _explore(evaluation, table):
        pass
    return table


def best_of(table: Tensor) -> Tensor:
    """Return per scale the candidate with the smallest distance; the first one wins a tie."""
    return table.argmin(0)


def leaders(table: Tensor, count: int) -> Tensor:
    """Return per scale the `count` candidates with the smallest distances, best first: (count, heads, columns)."""
    return table.argsort(dim=0, stable=True)[:count]


def _evaluate_promising(evaluation: Evaluation, table: Tensor, expected: Tensor) -> None:
    """Evaluate what the table lacks, the candidate with the smallest expected distance of each scale first.

    A candidate's luck is its distance over the expected one. A scale is done when none of its candidates would win even
    if it were as much luckier than the luckiest one so far as that one is than the average: a smooth landscape
    needs few evaluations, a rough one many.
    """
    left = expected.masked_fill(table.isfinite(), torch.inf)
    order = left.argsort(dim=0, stable=True)
    luckiest, total = torch.full_like(expected[0], torch.inf), torch.zeros_like(expected[0])
    heads, columns = torch.arange(table.shape[1])[:, None], torch.arange(table.shape[2])  # that are not done
    for rank in range(len(table)):
        indices = order[rank, :, columns]
        distance = evaluation(indices)
        table[indices, heads, columns] = distance
        hoped = expected[indices, heads, columns]
        luck = torch.where(hoped > 0, distance / hoped, 1.0)
        luckiest[:, columns] = torch.minimum(luckiest[:, columns], luck)
        total[:, columns] += luck
        if rank + 1 == len(table):
            return
        if rank + 1 < FIRST_FEW:
            continue
        hope = luckiest * luckiest / (total / (rank + 1))
        following = left.gather(0, order[rank + 1 : rank + 2])[0] * hope
        still = columns[(following <= table.amin(0)).any(0)[columns]]
        if not len(still):
            return
        narrower = evaluation.narrow(torch.searchsorted(columns, still)) if 2 * len(still) <= len(columns) else None
        if narrower is not None:
            evaluation, columns = narrower, still


def _explore(evaluation: Evaluation, table: Tensor) -> bool:
    """Evaluate the unknown neighbours of the best candidates; return whether there were any."""
    best, last = table.argmin(0), len(table) - 1
    beside = [(best + offset).clamp(0, last) for offset in (-1, 1)]
    if all(bool(table.gather(0, index[None]).isfinite().all()) for index in beside):
        return False
    for distance in range(1, REACH + 1):
        for offset in (-distance, distance):
            indices = (best + offset).clamp(0, last)
            table.scatter_(0, indices[None], evaluation(indices)[None])
    return True


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
