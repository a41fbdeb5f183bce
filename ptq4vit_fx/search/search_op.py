"""The search: choose the scales of one product so that its quantized output is nearest to its float output.

PTQ4ViT, Algorithm 1: alternate rhs and lhs; for each, take the candidate with the smallest distance while the other
operand stays quantized with its last choice. Pure tensor code; nothing here knows of graphs or modules.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from ptq4vit_fx.calibration import SearchResult
from ptq4vit_fx.errors import PTQWarning
from ptq4vit_fx.metrics import MSE, Metric, get_metric
from ptq4vit_fx.names import OPERANDS, Operand
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.qconfig import SearchSettings
from ptq4vit_fx.quantizers import Quantizer, Uniform
from ptq4vit_fx.search.candidates import Candidates, make_candidates, uniform_choice
from ptq4vit_fx.search.distances import (
    OTHER,
    Choice,
    OutputEvaluation,
    Parts,
    has_row_weights,
    make_evaluation,
    product_parts,
    quantized_operand,
    row_mass,
)
from ptq4vit_fx.search.products import Product
from ptq4vit_fx.search.sampling import sample_rows, sample_size
from ptq4vit_fx.search.screening import best_of, evaluate_all, leaders, screen

#: PTQ4ViT, Algorithm 1: the weight (or right operand) first.
SEARCH_ORDER: tuple[Operand, Operand] = ("rhs", "lhs")
#: A sample of this part of the screening sample says which candidates of an attention product are promising.
TINY_PART = 16
TINY_MINIMUM = 16
#: So many leading candidates of each operand are paired at the end of the screening of two activations.
PAIRED = 6


def search_op(
    op: QuantOp, product: Product, lhs: Quantizer, rhs: Quantizer, settings: SearchSettings, *, seed: int = 0
) -> SearchResult:
    """Search the parameters of both operands of one product.

    product: float operands, with element weights (dL/dout)^2 if the metric wants them. Without
    settings.screen_rows every candidate is evaluated on all rows in every round. With it, candidates are screened, on
    all rows where a closed form makes that cheap and else on a seeded sample of rows, and the best few are decided on
    all rows at the end. The result is never worse, on all rows, than the starting point.
    """
    metric = get_metric(settings.metric)
    product, metric, unit = _with_usable_weights(op, product, metric, rhs)
    candidates: dict[Operand, Candidates] = {
        "lhs": make_candidates(lhs, op, product, "lhs", settings),
        "rhs": make_candidates(rhs, op, product, "rhs", settings),
    }
    start = {key: uniform_choice(value, value.count) for key, value in candidates.items()}
    parts = product_parts(product)
    if settings.screen_rows is None:
        choice = _search_exhaustively(parts, metric, candidates, start, settings.rounds)
    else:
        choice = _search_screened(product, parts, metric, candidates, start, settings, seed)
    before, initial_snr = _total(parts, metric, candidates, start)
    after, snr = _total(parts, metric, candidates, choice)
    if after > before:
        choice, after, snr = start, before, initial_snr
    lhs_params, rhs_params = (candidates[operand].params(choice[operand]) for operand in OPERANDS)
    return SearchResult(lhs_params, rhs_params, before * unit, after * unit, snr)


def _search_exhaustively(
    parts: Parts, metric: Metric, candidates: dict[Operand, Candidates], choice: Choice, rounds: int
) -> Choice:
    """Evaluate every candidate on all rows in every round."""
    for _ in range(rounds):
        for operand in SEARCH_ORDER:
            evaluation = make_evaluation(parts, metric, candidates, choice, operand)
            choice = choice | {operand: best_of(evaluate_all(evaluation))}
    return choice


def _search_screened(
    product: Product,
    everything: Parts,
    metric: Metric,
    candidates: dict[Operand, Candidates],
    choice: Choice,
    settings: SearchSettings,
    seed: int,
) -> Choice:
    """Evaluate promising candidates, and decide the best few on all rows."""
    sample, tiny = _samples(product, everything, metric, candidates, settings, seed)
    screened_on = {"lhs": sample, "rhs": sample}
    if has_row_weights(everything, metric) and product.lhs.shape[3] < sum(part.lhs.shape[2] for part, _ in sample):
        screened_on["rhs"] = everything  # in closed form, cheaper there than on the sample
    tables: dict[Operand, Tensor] = {}
    expected: dict[Operand, Tensor] = {}
    beside: Choice = {}
    for _ in range(settings.rounds):
        for operand in SEARCH_ORDER:
            other = choice[OTHER[operand]]
            if operand in beside and torch.equal(beside[operand], other):
                continue  # nothing has changed since the round before
            beside[operand] = other
            prior = expected.get(operand)
            if prior is None and tiny is not None and candidates[operand].ordered:
                prior = evaluate_all(make_evaluation(tiny, metric, candidates, choice, operand))
            evaluation = make_evaluation(screened_on[operand], metric, candidates, choice, operand)
            tables[operand], expected[operand] = screen(evaluation, prior)
            choice = choice | {operand: best_of(tables[operand])}
    if sample is everything:
        return choice
    if tiny is not None and candidates["lhs"].groups == candidates["rhs"].groups:
        return _decide_pairs(sample, everything, metric, candidates, tables, settings.confirm)
    for operand in SEARCH_ORDER:
        if screened_on[operand] is sample:
            evaluation = make_evaluation(everything, metric, candidates, choice, operand)
            few = leaders(tables[operand], settings.confirm)
            best = evaluation(few).argmin(0)
            choice = choice | {operand: few.gather(0, best[None])[0]}
    if screened_on["rhs"] is everything and not torch.equal(beside["rhs"], choice["lhs"]):
        evaluation = make_evaluation(everything, metric, candidates, choice, "rhs")
        choice = choice | {"rhs": best_of(screen(evaluation, expected["rhs"])[0])}
    return choice


def _samples(
    product: Product,
    everything: Parts,
    metric: Metric,
    candidates: dict[Operand, Candidates],
    settings: SearchSettings,
    seed: int,
) -> tuple[Parts, Parts | None]:
    """Return the rows that screen candidates, and, for two activations, the rows that say which are promising.

    The distance of an attention product hangs on a few rows and has narrow minima, which a coarse grid would miss.
    """
    assert settings.screen_rows is not None
    generator = torch.Generator().manual_seed(seed)
    mass = row_mass(everything, metric, candidates)
    size = sample_size(mass, settings.screen_rows)
    few = sample_rows(product, mass, size, generator)
    if few is product:
        return everything, None
    tiny = None
    if not product.shares_rhs:
        fewer = sample_rows(product, mass, max(TINY_MINIMUM, size // TINY_PART), generator)
        tiny = product_parts(fewer)
    return product_parts(few), tiny


def _decide_pairs(
    sample: Parts,
    everything: Parts,
    metric: Metric,
    candidates: dict[Operand, Candidates],
    tables: dict[Operand, Tensor],
    count: int,
) -> Choice:
    """Pair the leading candidates of two activations on the sample, and decide the best `count` pairs on all rows.

    Alternating searches of two operands end where neither can improve alone; pairs find the better places nearby.
    """

    def distances(parts: Parts, left: Tensor, rights: Tensor) -> Tensor:
        return OutputEvaluation(parts, metric, candidates, {"lhs": left}, "rhs")(rights)

    lefts, rights = (leaders(tables[operand], PAIRED) for operand in OPERANDS)
    best = leaders(torch.cat([distances(sample, left, rights) for left in lefts]), count)
    left = lefts.repeat_interleave(len(rights), 0).gather(0, best)
    right = rights.repeat(len(lefts), 1, 1).gather(0, best)
    exact = torch.cat([distances(everything, a, b[None]) for a, b in zip(left, right, strict=True)])
    first = exact.argmin(0)[None]
    return {"lhs": left.gather(0, first)[0], "rhs": right.gather(0, first)[0]}


def _with_usable_weights(
    op: QuantOp, product: Product, metric: Metric, rhs: Quantizer
) -> tuple[Product, Metric, float]:
    """Scale the weights of a gradient metric to a mean of 1; without any gradient, say so and use squared error.

    The last value is what distances were divided by.

    A scale per output channel is chosen on one column of gradients, which a few images determine badly (the column of a
    class that none of them may be is zero): beside such scales every output of a row has the row's mean weight.
    """
    if not metric.weighted_by_gradient:
        return replace(product, element_weight=None), metric, 1.0
    weight = product.element_weight
    mean = 0.0 if weight is None else float(weight.double().mean())
    if weight is None or mean == 0.0:
        warnings.warn(
            f"{op.name}: the gradient of the loss is zero (the model is certain of every calibration image, or "
            "this product does not reach the output): its scales are chosen by plain squared error",
            PTQWarning,
            stacklevel=3,
        )
        return replace(product, element_weight=None), MSE, 1.0
    if isinstance(rhs, Uniform) and rhs.granularity == "channel":
        weight = weight.mean(-1, keepdim=True)
    return replace(product, element_weight=weight / mean), metric, mean


def _total(
    parts: Parts, metric: Metric, candidates: dict[Operand, Candidates], choice: Choice
) -> tuple[float, dict[str, float]]:
    """Return the distance of the whole product, all scales together, and signal-to-noise ratios in dB."""
    sums: Tensor | None = None
    energies = {name: [0.0, 0.0] for name in (*OPERANDS, "out")}
    operands = (quantized_operand(parts, candidates[operand], choice[operand], operand) for operand in OPERANDS)
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
