"""The search: choose the scales of one product so that its quantized output is nearest to its float output.

PTQ4ViT, Algorithm 1: alternate rhs and lhs; for each, take the candidate with the smallest distance while the other
operand stays quantized with its last choice. Pure tensor code; nothing here knows of graphs or modules.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq4vit_fx.candidates import Candidates, make_candidates, uniform_choice
from ptq4vit_fx.errors import PTQWarning
from ptq4vit_fx.metrics import MSE, Metric, get_metric
from ptq4vit_fx.plan import OPERANDS, Operand, QuantOp
from ptq4vit_fx.products import Product, ScaleGroups, sample_rows
from ptq4vit_fx.qconfig import SearchSettings
from ptq4vit_fx.quantizers import QParams, Quantizer, Uniform

#: Screening looks at every COARSE_STRIDE-th candidate, then at the gaps beside the best; later rounds look
#: LATER_REACH candidates to each side of the last choice, and follow it from there.
COARSE_STRIDE = 4
LATER_REACH = 5


@dataclass(frozen=True)
class SearchResult:
    """Parameters of both operands, and what they do on all rows.

    distance_before is at the initial scales. snr: signal-to-noise ratio in dB, 10 log10(sum x^2 / sum (x^ - x)^2), of
    "lhs", "rhs" and "out"; infinite where quantization changes nothing.
    """

    lhs: QParams
    rhs: QParams
    distance_before: float
    distance_after: float
    snr: dict[str, float]


def search_op(
    op: QuantOp, product: Product, lhs: Quantizer, rhs: Quantizer, settings: SearchSettings, *, seed: int = 0
) -> SearchResult:
    """Search the parameters of both operands of one product.

    product: float operands, with element weights (dL/dout)^2 if the metric wants them. With
    settings.screen_rows, candidates are screened on a seeded sample of rows, coarse to fine, and the best few are
    decided on all rows in the last round; without, every candidate is evaluated on all rows in every round.
    The result is never worse, on all rows, than the starting point.
    """
    metric = get_metric(settings.metric)
    product, metric = _with_usable_weights(op, product, metric, rhs)
    candidates: dict[Operand, Candidates] = {
        "lhs": make_candidates(lhs, op, product, "lhs", settings),
        "rhs": make_candidates(rhs, op, product, "rhs", settings),
    }
    start = {key: uniform_choice(value, value.count) for key, value in candidates.items()}
    choice = dict(start)
    everything = sample = _parts(product)
    if settings.screen_rows is not None:
        few = sample_rows(product, settings.screen_rows, torch.Generator().manual_seed(seed))
        sample = everything if few is product else _parts(few)
    for round_number in range(settings.rounds):
        for operand in ("rhs", "lhs"):
            screening = _Evaluation(sample, metric, candidates, choice, operand)
            confirm = None
            if sample is not everything and round_number == settings.rounds - 1:
                confirm = _Evaluation(everything, metric, candidates, choice, operand)
            choice = choice | {operand: _best(screening, confirm, settings, round_number)}
    before, initial_snr = _total(everything, metric, candidates, start)
    after, snr = _total(everything, metric, candidates, choice)
    if after > before:
        choice, after, snr = start, before, initial_snr
    lhs_params, rhs_params = (candidates[operand].params(choice[operand]) for operand in OPERANDS)
    return SearchResult(lhs_params, rhs_params, before, after, snr)


def _with_usable_weights(op: QuantOp, product: Product, metric: Metric, rhs: Quantizer) -> tuple[Product, Metric]:
    """Scale the weights of a gradient metric to a mean of 1; without any gradient, say so and use squared error.

    A scale per output channel is chosen on one column of gradients, which a few images determine badly (the column of a
    class that none of them may be is zero): beside such scales every output of a row has the row's mean weight.
    """
    if not metric.weighted_by_gradient:
        return replace(product, element_weight=None), metric
    weight = product.element_weight
    mean = 0.0 if weight is None else float(weight.double().mean())
    if weight is None or mean == 0.0:
        warnings.warn(
            f"{op.name}: the gradient of the loss is zero (the model is certain of every calibration image, or "
            "this product does not reach the output): its scales are chosen by plain squared error",
            PTQWarning,
            stacklevel=3,
        )
        return replace(product, element_weight=None), MSE
    if isinstance(rhs, Uniform) and rhs.granularity == "channel":
        weight = weight.mean(-1, keepdim=True)
    return replace(product, element_weight=weight / mean), metric


#: The chunks of a product with their float outputs, computed once per product.
Parts = list[tuple[Product, Tensor]]


def _parts(product: Product) -> Parts:
    return [(part, part.output(part.lhs, part.rhs)) for part in product.chunks()]


class _Evaluation:
    """Distances of one operand's candidates on some rows, while the other operand keeps its last choice."""

    def __init__(
        self,
        parts: Parts,
        metric: Metric,
        candidates: dict[Operand, Candidates],
        choice: dict[Operand, Tensor],
        operand: Operand,
    ) -> None:
        other: Operand = "rhs" if operand == "lhs" else "lhs"
        self.parts, self.metric, self.operand = parts, metric, operand
        self.searched, self.last = candidates[operand], choice[operand]
        self._fixed = list(_quantized(parts, candidates[other], choice[other], other))

    def __call__(self, indices: Tensor) -> Tensor:
        """Return the distance per scale, float64 (heads, columns), of candidates `indices` of the same shape."""
        tried = _quantized(self.parts, self.searched, indices, self.operand)
        sums: Tensor | None = None
        for (part, target), fixed, candidate in zip(self.parts, self._fixed, tried, strict=True):
            operands = (candidate, fixed) if self.operand == "lhs" else (fixed, candidate)
            terms = self._sums(part, target, part.output(*operands))
            sums = terms if sums is None else sums + terms
        assert sums is not None
        return self.metric.finish(sums).cpu()

    def _sums(self, part: Product, target: Tensor, estimate: Tensor) -> Tensor:
        statistics = self.metric.statistics(target, estimate)
        weight = part.element_weight
        if self.searched.groups == ScaleGroups() and (weight is None or weight.shape == target.shape):
            totals = [s.sum() if weight is None else torch.dot(s.flatten(), weight.flatten()) for s in statistics]
            return torch.stack(totals).double()[:, None, None]
        weighted = [s if weight is None else s * weight for s in statistics]
        return self.searched.groups.reduce(torch.stack([w.sum((0, 2)) for w in weighted]).double())


def _quantized(parts: Parts, candidates: Candidates, indices: Tensor, operand: Operand) -> Iterator[Tensor]:
    """Yield the quantized operand of each part; a weight that all parts share is quantized once."""
    shared: Tensor | None = None
    for part, _ in parts:
        x = part.lhs if operand == "lhs" else part.rhs
        if operand == "rhs" and part.rhs.shape[0] == 1:
            shared = candidates.fake_quantize(x, indices) if shared is None else shared
            yield shared
        else:
            yield candidates.fake_quantize(x, indices)


def _best(screening: _Evaluation, confirm: _Evaluation | None, settings: SearchSettings, round_number: int) -> Tensor:
    """Return the best candidate per scale."""
    candidates = screening.searched
    if settings.screen_rows is None or not candidates.ordered or candidates.count <= 4 * COARSE_STRIDE:
        table = _evaluate(screening, _every(candidates, range(candidates.count)))
    elif round_number == 0:
        table = _evaluate(screening, _every(candidates, range(COARSE_STRIDE - 1, candidates.count, COARSE_STRIDE)))
        table = _around(screening, table, _argmin(table), COARSE_STRIDE - 1)
    else:
        table = _follow(screening, screening.last)
    if confirm is None:
        return _argmin(table)
    return _argmin(_evaluate(confirm, _leaders(table, settings.confirm)))


Table = list[tuple[Tensor, Tensor]]


def _evaluate(evaluation: _Evaluation, indices: list[Tensor]) -> Table:
    return [(index, evaluation(index)) for index in indices]


def _every(candidates: Candidates, numbers: range) -> list[Tensor]:
    return [uniform_choice(candidates, number) for number in numbers]


def _around(evaluation: _Evaluation, table: Table, centre: Tensor, reach: int) -> Table:
    """Add the neighbours of `centre`; each scale has its own centre, so one evaluation serves all scales."""
    last = evaluation.searched.count - 1
    offsets = [offset for distance in range(1, reach + 1) for offset in (-distance, distance)]
    return table + _evaluate(evaluation, [(centre + offset).clamp(0, last) for offset in offsets])


def _follow(evaluation: _Evaluation, centre: Tensor) -> Table:
    """Look around `centre`, and further on where the best of some scale lies at the edge of what was looked at.

    The other operand has moved since the last round, and this one may have far to go: from 0.5 to 0.8 of the range
    is usual at 4 bits.
    """
    table = _evaluate(evaluation, [centre])
    while True:
        table = _around(evaluation, table, centre, LATER_REACH)
        best = _argmin(table)
        if int((best - centre).abs().max()) < LATER_REACH:
            return table
        centre = best


def _argmin(table: Table) -> Tensor:
    """Return per scale the candidate with the smallest distance; the first one wins a tie."""
    where = torch.stack([distance for _, distance in table]).argmin(0)
    return torch.stack([index for index, _ in table]).gather(0, where[None])[0]


def _leaders(table: Table, count: int) -> list[Tensor]:
    """Return the `count` best entries per scale."""
    order = torch.stack([distance for _, distance in table]).argsort(stable=True, dim=0)
    indices = torch.stack([index for index, _ in table])
    return list(indices.gather(0, order[:count]).unbind(0))


def _total(
    parts: Parts, metric: Metric, candidates: dict[Operand, Candidates], choice: dict[Operand, Tensor]
) -> tuple[float, dict[str, float]]:
    """Return the distance of the whole product, all scales together, and signal-to-noise ratios in dB."""
    sums: Tensor | None = None
    energies = {name: [0.0, 0.0] for name in (*OPERANDS, "out")}
    operands = (_quantized(parts, candidates[operand], choice[operand], operand) for operand in OPERANDS)
    for (part, target), lhs, rhs in zip(parts, *operands, strict=True):
        estimate = part.output(lhs, rhs)
        for name, exact, quantized in (("lhs", part.lhs, lhs), ("rhs", part.rhs, rhs), ("out", target, estimate)):
            energies[name][0] += float(torch.linalg.vector_norm(exact)) ** 2
            energies[name][1] += float(torch.linalg.vector_norm(quantized - exact)) ** 2
        weight = part.element_weight
        statistics = metric.statistics(target, estimate)
        terms = torch.stack([(s if weight is None else s * weight).sum(dtype=torch.float64) for s in statistics])
        sums = terms if sums is None else sums + terms
    assert sums is not None
    return float(metric.finish(sums)), {name: _decibel(*energy) for name, energy in energies.items()}


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf
