"""How far a product is from its float output with some candidate parameters: on rows, or in closed form.

Where every output of a row has the same weight, a squared distance is a quadratic form of the error of the operand
that is searched. Its matrices are computed once; a candidate then costs no pass over the outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ptq4vit_fx.metrics import Metric
from ptq4vit_fx.names import Operand
from ptq4vit_fx.search.candidates import Candidates, uniform_choice
from ptq4vit_fx.search.products import Product, ScaleGroups, step_elements

#: The chunks of a product with their float outputs, computed once per product.
Parts = list[tuple[Product, Tensor]]

#: The chosen candidate of each scale, (heads, columns) per operand.
Choice = dict[Operand, Tensor]

#: The operand that keeps its choice while one is searched.
OTHER: dict[Operand, Operand] = {"lhs": "rhs", "rhs": "lhs"}

#: So many candidates are evaluated at once at most: of the last ones not all would have been.
MOST_STACKED = 16

#: Shares of the candidates at which `row_mass` looks: a scale that clips a lot, and one near where most searches end.
PILOTS = (0.5, 0.8)


class Evaluation(Protocol):
    """Distances of one operand's candidates while the other operand keeps its last choice.

    at_once: so many choices cost little more than one.
    """

    searched: Candidates
    at_once: int

    def __call__(self, indices: Tensor) -> Tensor:
        """Return the distance per scale, float64 (count, heads, columns), of candidates `indices` of the same shape."""
        ...

    def narrow(self, columns: Tensor) -> Evaluation | None:
        """Return the evaluation of these scales alone (numbers of columns), or None if that would not be cheaper."""
        ...


def product_parts(product: Product) -> Parts:
    """Return the chunks of a product with their float outputs."""
    return [(part, part.output(part.lhs, part.rhs)) for part in product.chunks()]


def quantized_operand(parts: Parts, candidates: Candidates, indices: Tensor, operand: Operand) -> Iterator[Tensor]:
    """Yield the quantized operand of each part; a weight that all parts share is quantized once."""
    shared: Tensor | None = None
    for part, _ in parts:
        x = part.lhs if operand == "lhs" else part.rhs
        if operand == "rhs" and part.shares_rhs:
            shared = candidates.fake_quantize(x, indices) if shared is None else shared
            yield shared
        else:
            yield candidates.fake_quantize(x, indices)


class OutputEvaluation:
    """Distances by computing the product: any metric, either operand.

    Choices of candidates are stacked along the rows of the lhs or the columns of the rhs: one larger product.
    """

    def __init__(
        self, parts: Parts, metric: Metric, candidates: dict[Operand, Candidates], choice: Choice, operand: Operand
    ) -> None:
        other = OTHER[operand]
        self.parts, self.metric, self.operand, self.searched = parts, metric, operand, candidates[operand]
        self._fixed = list(quantized_operand(parts, candidates[other], choice[other], other))
        elements = sum(max(part.lhs.numel(), part.rhs.numel(), target.numel()) for part, target in parts)
        self.at_once = _stacked_candidates(elements, parts)

    def __call__(self, indices: Tensor) -> Tensor:
        return torch.cat([self._stacked(some) for some in torch.split(indices, self.at_once)])

    def narrow(self, columns: Tensor) -> None:
        """Say that some scales cost as much as all."""

    def _stacked(self, indices: Tensor) -> Tensor:
        axis = 2 if self.operand == "lhs" else 3
        shared: Tensor | None = None
        sums: Tensor | None = None
        for (part, target), fixed in zip(self.parts, self._fixed, strict=True):
            if self.operand == "lhs":
                tried = self.searched.fake_quantize(part.lhs.unsqueeze(axis), indices, axis).flatten(2, 3)
                out = torch.unflatten(torch.matmul(tried, fixed), 2, (len(indices), -1))
            else:
                tried = self._tried_rhs(part, indices) if shared is None else shared
                shared = tried if part.shares_rhs else None
                out = torch.unflatten(torch.matmul(fixed, tried), 3, (len(indices), -1))
            terms = self._sums(part, target.unsqueeze(axis), out, axis)
            sums = terms if sums is None else sums + terms
        assert sums is not None
        return self.metric.finish(sums).cpu()

    def _tried_rhs(self, part: Product, indices: Tensor) -> Tensor:
        return self.searched.fake_quantize(part.rhs.unsqueeze(3), indices, 3).flatten(3, 4)

    def _sums(self, part: Product, target: Tensor, out: Tensor, axis: int) -> Tensor:
        """Return the metric's sums per scale: (statistics, count, heads, columns)."""
        out = out if part.bias is None else out.add_(part.bias.unsqueeze(-2))
        statistics = (s.expand_as(out) for s in self.metric.statistics(target, out))
        weight = None if part.element_weight is None else part.element_weight.unsqueeze(axis)
        weighted = [s if weight is None else s * weight for s in statistics]
        totals = torch.stack([w.sum((0, 5 - axis)) for w in weighted])  # (statistics, heads, count, columns)
        return self.searched.groups.reduce(totals.transpose(1, 2).double())


class WeightEvaluation:
    """Squared distances of a weight w beside quantized activations x^, R = diag(weights of the rows).

    The error of the outputs is x^ (w^ - w) + (x^ - x) w, so with d = w^ - w a column's distance is

        d' (x^' R x^) d + 2 d' (x^' R (x^ - x) w) + constant
    """

    def __init__(self, parts: Parts, candidates: dict[Operand, Candidates], choice: Choice) -> None:
        self.searched = candidates["rhs"]
        self._weight = parts[0][0].rhs
        self.at_once = _stacked_candidates(self._weight.numel(), parts)
        heads, inner, columns = self._weight.shape[1:]
        self._square = self._weight.new_zeros(1, heads, inner, inner)
        self._linear = self._weight.new_zeros(1, heads, inner, columns)
        self._constant = self._weight.new_zeros(heads, columns, dtype=torch.float64)
        quantized = quantized_operand(parts, candidates["lhs"], choice["lhs"], "lhs")
        for (part, target), x in zip(parts, quantized, strict=True):
            error = part.output(x, part.rhs).sub_(target)
            weighted = x if part.element_weight is None else x * part.element_weight
            self._square += weighted.mT @ x
            self._linear += (weighted.mT @ error).mul_(2)
            self._constant += _weighted_squares(error, part).sum((0, 2)).double()

    def __call__(self, indices: Tensor) -> Tensor:
        return torch.cat([self._stacked(some) for some in torch.split(indices, self.at_once)])

    def _stacked(self, indices: Tensor) -> Tensor:
        weight = self._weight.unsqueeze(3)
        change = self.searched.fake_quantize(weight, indices, 3).sub_(weight)
        product = torch.unflatten(self._square @ change.flatten(3, 4), 3, (len(indices), -1))
        distance = product.add_(self._linear.unsqueeze(3)).mul_(change).sum((0, 2)).double()
        return self.searched.groups.reduce(distance.transpose(0, 1) + self._constant).cpu()

    def narrow(self, columns: Tensor) -> WeightEvaluation | None:
        """Return the evaluation of some output channels, if each has a scale."""
        if self.searched.groups != ScaleGroups(1, self._weight.shape[3]):
            return None
        part = copy.copy(self)
        part.searched = self.searched.narrow(columns)
        part._weight, part._linear = self._weight[..., columns], self._linear[..., columns]
        part._constant = self._constant[:, columns]
        return part


class ActivationEvaluation:
    """Squared distances of activations x beside a quantized weight w^, all of them with one scale.

    The error of the outputs is (x^ - x) w^ + x (w^ - w), so with d = x^ - x a row's distance is, but for its weight,

        d (w^ w^') d' + 2 d (w^ (w^ - w)' x') + constant
    """

    def __init__(self, parts: Parts, candidates: dict[Operand, Candidates], choice: Choice) -> None:
        self.searched = candidates["lhs"]
        self.parts = parts
        self.at_once = _stacked_candidates(sum(part.lhs.numel() for part, _ in parts), parts)
        weight = next(quantized_operand(parts, candidates["rhs"], choice["rhs"], "rhs"))
        self._square = weight @ weight.mT
        self._linear: list[Tensor] = []
        self._constant = weight.new_zeros((), dtype=torch.float64)
        for part, target in parts:
            error = part.output(part.lhs, weight).sub_(target)
            self._linear.append((error @ weight.mT).mul_(2))
            self._constant += _weighted_squares(error, part).sum(dtype=torch.float64)

    def __call__(self, indices: Tensor) -> Tensor:
        return torch.cat([self._stacked(some) for some in torch.split(indices, self.at_once)])[:, None, None]

    def _stacked(self, indices: Tensor) -> Tensor:
        total = self._constant.expand(len(indices))
        for (part, _), linear in zip(self.parts, self._linear, strict=True):
            x = part.lhs.unsqueeze(2)
            change = self.searched.fake_quantize(x, indices, 2).sub_(x)
            product = torch.unflatten(change.flatten(2, 3) @ self._square, 2, (len(indices), -1))
            rows = product.add_(linear.unsqueeze(2)).mul_(change).sum(-1, keepdim=True)
            rows = rows if part.element_weight is None else rows.mul_(part.element_weight.unsqueeze(2))
            total = total + rows.sum((0, 1, 3, 4), dtype=torch.float64)
        return total.cpu()

    def narrow(self, columns: Tensor) -> None:
        """Say that there is one scale only."""


def _stacked_candidates(elements: int, parts: Parts) -> int:
    """Return how many candidates to evaluate at once where one of them computes so many elements."""
    return min(max(1, step_elements(parts[0][1].device) // elements), MOST_STACKED)


def make_evaluation(
    parts: Parts, metric: Metric, candidates: dict[Operand, Candidates], choice: Choice, operand: Operand
) -> Evaluation:
    """Return the cheapest evaluation of one operand's candidates on these rows; all of them are exact."""
    if has_row_weights(parts, metric):
        part = parts[0][0]
        inner, columns = part.rhs.shape[2:]
        if operand == "rhs" and inner < sum(p.lhs.shape[2] for p, _ in parts):
            return WeightEvaluation(parts, candidates, choice)
        if operand == "lhs" and inner < columns and candidates["lhs"].groups == ScaleGroups():
            return ActivationEvaluation(parts, candidates, choice)
    return OutputEvaluation(parts, metric, candidates, choice, operand)


def has_row_weights(parts: Parts, metric: Metric) -> bool:
    """Return whether the distance is a quadratic form of a shared weight: squared errors, one weight per row."""
    part = parts[0][0]
    one_weight_per_row = part.element_weight is None or part.element_weight.shape[-1] == 1
    return metric.is_squared_error and one_weight_per_row and part.shares_rhs


def row_mass(parts: Parts, metric: Metric, candidates: dict[Operand, Candidates]) -> Tensor:
    """Return how much of the squared distance lies on each row, (batch, heads, rows), summed over pilot candidates.

    A pilot quantizes one operand and leaves the other as it is; all pilots count alike. A weight that is evaluated
    on all rows needs none.
    """
    total: Tensor | None = None
    for operand, searched in candidates.items():
        if operand == "rhs" and has_row_weights(parts, metric):
            continue
        for share in PILOTS:
            pilot = uniform_choice(searched, min(int(share * searched.count), searched.count - 1))
            mass = _pilot_mass(parts, list(quantized_operand(parts, searched, pilot, operand)), operand)
            total = mass if total is None else total + mass
    assert total is not None
    return total


def _pilot_mass(parts: Parts, quantized: list[Tensor], operand: Operand) -> Tensor:
    rows = []
    for (part, target), x in zip(parts, quantized, strict=True):
        error = part.output(x, part.rhs) if operand == "lhs" else part.output(part.lhs, x)
        rows.append(_weighted_squares(error.sub_(target), part).sum(-1))
    mass = torch.cat(rows, 2 if parts[0][0].shares_rhs else 0)
    return mass / mass.sum((0, 2), keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)


def _weighted_squares(error: Tensor, part: Product) -> Tensor:
    """Square the error in place and weigh it."""
    squares = error.square_()
    return squares if part.element_weight is None else squares.mul_(part.element_weight)
