"""The search: choose the scales of one product so that its quantized output is nearest to its float output.

PTQ4ViT, Algorithm 1: alternate rhs and lhs; for each, take the candidate with the smallest distance while the other
operand stays quantized with its last choice. Pure tensor code; nothing here knows of graphs or modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ptq4vit_fx.errors import PTQWarning
from ptq4vit_fx.metrics import MSE, Metric, get_metric
from ptq4vit_fx.plan import OPERANDS, Operand, QuantOp
from ptq4vit_fx.products import Product, ScaleGroups, sample_rows, scale_groups, site_params
from ptq4vit_fx.qconfig import SearchSettings
from ptq4vit_fx.quantizers import QParams, Quantizer, TwinParams, TwinUniform, Uniform

#: Screening looks at every COARSE_STRIDE-th candidate, then at the gaps beside the best; later rounds look
#: LATER_REACH candidates to each side of the last choice, and follow it from there.
COARSE_STRIDE = 4
LATER_REACH = 5


@dataclass(frozen=True)
class SearchResult:
    """Parameters of both operands, and the distance before (initial scales) and after, on all rows."""

    lhs: QParams
    rhs: QParams
    distance_before: float
    distance_after: float


class Candidates(Protocol):
    """The candidate parameters of one operand. Index `count` is the starting point, beside 0 .. count - 1."""

    count: int
    groups: ScaleGroups
    ordered: bool

    def fake_quantize(self, x: Tensor, indices: Tensor) -> Tensor:
        """Return x quantized with candidate indices[head, column] for each scale."""
        ...

    def params(self, indices: Tensor) -> QParams:
        """Return the parameters of the chosen candidates."""
        ...


class _UniformCandidates:
    """Scales factor[i] * initial scale, one choice per scale group."""

    ordered = True

    def __init__(
        self, quantizer: Uniform, op: QuantOp, product: Product, operand: Operand, settings: SearchSettings
    ) -> None:
        self.is_weight = operand == "rhs" and op.rhs_is_weight
        x = product.lhs if operand == "lhs" else product.rhs
        self.quantizer, self.op, self.product = quantizer, op, product
        self.groups = scale_groups(quantizer.granularity, quantizer.groups, product, op, is_weight=self.is_weight)
        self.initial = quantizer.initial_scale(self.groups.absmax(x))
        self.factors = torch.tensor([*settings.factors, 1.0], dtype=torch.float32, device=x.device)
        self.count = len(settings.factors)

    def scales(self, indices: Tensor) -> Tensor:
        return self.factors[indices] * self.initial

    def fake_quantize(self, x: Tensor, indices: Tensor) -> Tensor:
        scale = self.groups.expand(self.scales(indices), x.shape[1], x.shape[3])
        return self.quantizer.fake_quantize(x, scale)

    def params(self, indices: Tensor) -> QParams:
        return site_params(self.op, self.groups, self.scales(indices), self.product, is_weight=self.is_weight)


class _TwinCandidates:
    """Thresholds 2^-m (softmax) or coarse scales factor[i] * initial scale (GELU), one choice per tensor."""

    groups = ScaleGroups()

    def __init__(self, quantizer: TwinUniform, x: Tensor, settings: SearchSettings) -> None:
        self.quantizer = quantizer
        self.ordered = quantizer.form == "gelu"
        if quantizer.form == "softmax":
            self.choices = [quantizer.softmax_params(shift, x) for shift in (*range(settings.max_shift + 1), 0)]
        else:
            initial = Uniform(quantizer.bits).initial_scale(x.amax().clamp_min(0))
            self.choices = [quantizer.gelu_params(initial * factor) for factor in (*settings.factors, 1.0)]
        self.count = len(self.choices) - 1

    def params(self, indices: Tensor) -> TwinParams:
        return self.choices[int(indices)]

    def fake_quantize(self, x: Tensor, indices: Tensor) -> Tensor:
        return self.quantizer.fake_quantize(x, self.params(indices))


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
    product, metric = _with_usable_weights(op, product, metric)
    candidates: dict[Operand, Candidates] = {
        "lhs": _candidates(lhs, op, product, "lhs", settings),
        "rhs": _candidates(rhs, op, product, "rhs", settings),
    }
    start = {key: _full(value, value.count) for key, value in candidates.items()}
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
    before = _total(everything, metric, candidates, start)
    after = _total(everything, metric, candidates, choice)
    if after > before:
        choice, after = start, before
    return SearchResult(candidates["lhs"].params(choice["lhs"]), candidates["rhs"].params(choice["rhs"]), before, after)


def _with_usable_weights(op: QuantOp, product: Product, metric: Metric) -> tuple[Product, Metric]:
    """Scale the weights of a gradient metric to a mean of 1; without any gradient, say so and use squared error."""
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
    return replace(product, element_weight=weight / mean), metric


def _candidates(
    quantizer: Quantizer, op: QuantOp, product: Product, operand: Operand, settings: SearchSettings
) -> Candidates:
    if isinstance(quantizer, Uniform):
        return _UniformCandidates(quantizer, op, product, operand, settings)
    return _TwinCandidates(quantizer, product.lhs if operand == "lhs" else product.rhs, settings)


def _full(candidates: Candidates, index: int) -> Tensor:
    return torch.full((candidates.groups.heads, candidates.groups.columns), index, dtype=torch.long)


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
    return [_full(candidates, number) for number in numbers]


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


def _total(parts: Parts, metric: Metric, candidates: dict[Operand, Candidates], choice: dict[Operand, Tensor]) -> float:
    """Return the distance of the whole product, all scales together."""
    sums: Tensor | None = None
    operands = (_quantized(parts, candidates[operand], choice[operand], operand) for operand in OPERANDS)
    for (part, target), lhs, rhs in zip(parts, *operands, strict=True):
        weight = part.element_weight
        statistics = metric.statistics(target, part.output(lhs, rhs))
        terms = torch.stack([(s if weight is None else s * weight).sum(dtype=torch.float64) for s in statistics])
        sums = terms if sums is None else sums + terms
    assert sums is not None
    return float(metric.finish(sums))
