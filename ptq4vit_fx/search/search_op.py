"""The search: choose the scales of one product so that its quantized output is nearest to its float output.

PTQ4ViT, Algorithm 1: alternate rhs and lhs; for each, take the candidate with the smallest distance while the other
operand stays quantized with its last choice. Pure tensor code; nothing here knows of graphs or modules.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ptq4vit_fx.calibration import SearchResult
from ptq4vit_fx.inputs.settings import SearchSettings
from ptq4vit_fx.names import Operand
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.quantizers import Quantizer
from ptq4vit_fx.search.candidates import make_candidates
from ptq4vit_fx.search.landscape import Choice, Landscape, Total
from ptq4vit_fx.search.magnitudes import divided, divided_quantizer, exponents_of, multiplied
from ptq4vit_fx.search.metrics import MSE, Metric, get_metric
from ptq4vit_fx.search.own_errors import own_best, settle
from ptq4vit_fx.search.products import Product, weight_in_graph
from ptq4vit_fx.search.rounding import fits, round_weight
from ptq4vit_fx.search.strategies import SEARCH_ORDER, Exhaustive, Screened, Strategy

#: What an infinite square of a gradient counts as: sums of so many of them are finite.
LARGEST_WEIGHT = 2.0**90


def search_op(
    op: QuantOp, product: Product, lhs: Quantizer, rhs: Quantizer, settings: SearchSettings, *, seed: int = 0
) -> SearchResult:
    """Search the parameters of both operands of one product.

    product: float operands, with element weights (dL/dout)^2 if the metric wants them. Without
    settings.screen_rows every candidate is evaluated on all rows in every round. With it, candidates are screened, on
    all rows where a closed form makes that cheap and else on a seeded sample of rows, and the best few are decided on
    all rows at the end. Of several starts (`_starts`) the best end wins; on all rows it is never worse than the initial
    scales, but for the hundredth that `settle` may give away. settings.rounding="gram": the weight is then rounded by
    the Gram matrix of its inputs, where the distance on all rows is no larger than with each value rounded to nearest,
    and where a row has one weight its scales are those of which this rounding leaves least (`RoundingEvaluation`).
    """
    product, metric, unit = _with_usable_weights(product, get_metric(settings.metric), rhs)
    given: dict[Operand, Quantizer] = {"lhs": lhs, "rhs": rhs}
    exponents = exponents_of(product, given)
    product, unit = divided(product, exponents), unit * 2.0 ** (metric.degree * sum(exponents.values()))
    quantizers = {operand: divided_quantizer(given[operand], exponent) for operand, exponent in exponents.items()}
    candidates = {o: make_candidates(quantizer, op, product, o, settings) for o, quantizer in quantizers.items()}
    is_rounded = settings.rounding == "gram" and op.rhs_is_weight and fits(rhs)
    landscape = Landscape(product, metric, candidates, is_rounded)
    start, zero = landscape.start(), landscape.zero_distance()
    screened = settings.screen_rows is not None
    strategy: Strategy = Screened.of(landscape, settings, seed) if screened else Exhaustive(landscape)
    ends = [_end(strategy.anew(), place, settings.rounds) for place in _starts(landscape)]
    totals = [(landscape.total(choice), choice) for choice in (*ends, start)]
    # Nearest codes say little of scales that were searched for others: then the start is compared at the end.
    for_rounding = landscape.searched_alone("rhs")
    (after, snr), choice = min(totals[:-1] if for_rounding else totals, key=lambda item: item[0][0])
    (before, _), _ = totals[-1]
    settled = settle(landscape, choice)
    if settled is not choice:
        choice, (after, snr) = settled, landscape.total(settled)
    codes = None
    if is_rounded and _holds(landscape, choice, rhs, exponents["rhs"]):
        codes, (after, snr) = _rounded(op, landscape, choice, (after, snr))
    if for_rounding and before < after:
        codes, ((after, snr), choice) = None, totals[-1]
    params = {o: multiplied(given[o], candidates[o].params(indices), exponents[o]) for o, indices in choice.items()}
    share = after / zero if zero > 0.0 else 0.0
    without_gradient = metric is not get_metric(settings.metric)
    return SearchResult(params["lhs"], params["rhs"], before * unit, after * unit, snr, share, without_gradient, codes)


def _holds(landscape: Landscape, choice: Choice, rhs: Quantizer, exponent: int) -> bool:
    """Return whether the weight's scales are those of the search but for 2^exponent: then its codes are theirs too."""
    divided = landscape.candidates["rhs"].params(choice["rhs"])
    pairs = zip(multiplied(rhs, divided, exponent).tensors().values(), divided.tensors().values(), strict=True)
    return all(torch.equal(own, scale * math.ldexp(1.0, exponent)) for own, scale in pairs)


def _rounded(op: QuantOp, landscape: Landscape, choice: Choice, nearest: Total) -> tuple[Tensor | None, Total]:
    """Return the codes of a weight as the graph has it, and what they come to; None and `nearest` if that is less."""
    found = round_weight(landscape, choice, op.name)
    if found is None:
        return None, nearest
    codes, values = found
    total = landscape.total(choice, values)
    return (weight_in_graph(op, landscape.product, codes), total) if total[0] <= nearest[0] else (None, nearest)


def _starts(landscape: Landscape) -> list[Choice]:
    """Return the initial scales, and where candidates are so far apart that basins may be too, each operand's own best.

    From scale to scale of one grid the distance changes little, and searches from the two starts end equally well. From
    one threshold of a softmax twin to the next one it may fall by orders of magnitude.
    """
    far_apart = any(not candidates.ordered for candidates in landscape.candidates.values())
    return [landscape.start(), own_best(landscape)] if far_apart else [landscape.start()]


def _end(strategy: Strategy, start: Choice, rounds: int) -> Choice:
    return strategy.decide(alternate(strategy, start, rounds))


def alternate(strategy: Strategy, start: Choice, rounds: int) -> Choice:
    """Return where Algorithm 1 ends from a start: rhs and lhs in turn, each the best beside the other's last choice."""
    choice = start
    for _ in range(rounds):
        for operand in SEARCH_ORDER:
            choice = choice | {operand: strategy.best(operand, choice)}
    return choice


def _with_usable_weights(product: Product, metric: Metric, rhs: Quantizer) -> tuple[Product, Metric, float]:
    """Scale the weights of a gradient metric to a mean of 1; without any gradient, take squared error.

    The last value is what distances were divided by.

    A scale per output channel is chosen on one column of gradients, which a few images determine badly (the column of a
    class that none of them may be is zero): beside such scales every output of a row has the row's mean weight.
    """
    if not metric.weighted_by_gradient:
        return replace(product, element_weight=None), metric, 1.0
    weight = product.element_weight
    mean = 0.0 if weight is None else float(weight.double().mean())
    if weight is None or mean == 0.0:
        return replace(product, element_weight=None), MSE, 1.0
    if mean == math.inf:  # squares of gradients above 1.8e19
        weight = weight.clamp_max(LARGEST_WEIGHT)
        mean = float(weight.double().mean())
    if rhs.granularity == "channel":
        weight = weight.mean(-1, keepdim=True)
    return replace(product, element_weight=weight / mean), metric, mean
