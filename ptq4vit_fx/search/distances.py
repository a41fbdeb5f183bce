"""Evaluating the candidates of one operand in a landscape: on the outputs, in closed form, or by what rounding leaves.

Where every output of a row has the same weight, a squared distance is a quadratic form of the error of the operand
that is searched. Its matrices are computed once; a candidate then costs no pass over the outputs.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from ptq4vit_fx.names import Operand
from ptq4vit_fx.search.candidates import Candidates
from ptq4vit_fx.search.gram import left_over, root_weighted
from ptq4vit_fx.search.landscape import OTHER, Choice, Landscape
from ptq4vit_fx.search.products import Product, ScaleGroups, step_elements

#: So many candidates are evaluated at once at most: of the last ones not all would have been.
MOST_STACKED = 16


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


def make_evaluation(landscape: Landscape, operand: Operand, choice: Choice) -> Evaluation:
    """Return the cheapest evaluation of one operand's candidates beside the other's choice.

    All of them are exact, but for that of a weight that will be rounded by the Gram matrix.
    """
    if landscape.searched_alone(operand):
        return RoundingEvaluation(landscape)
    if landscape.has_row_weights:
        rows, inner = landscape.product.lhs.shape[2:]
        columns = landscape.product.rhs.shape[3]
        if operand == "rhs" and inner < rows:
            return WeightEvaluation(landscape, choice)
        if operand == "lhs" and inner < columns and landscape.candidates["lhs"].groups == ScaleGroups():
            return ActivationEvaluation(landscape, choice)
    return OutputEvaluation(landscape, operand, choice)


class OutputEvaluation:
    """Distances by computing the product: any metric, either operand.

    Choices of candidates are stacked along the rows of the lhs or the columns of the rhs: one larger product.
    """

    def __init__(self, landscape: Landscape, operand: Operand, choice: Choice) -> None:
        self.searched = landscape.candidates[operand]
        self._landscape, self._operand, other = landscape, operand, OTHER[operand]
        self._fixed = list(landscape.quantized(other, choice[other]))
        sizes = (max(part.lhs.numel(), part.rhs.numel(), target.numel()) for part, target in landscape.parts)
        self.at_once = _stacked_candidates(sum(sizes), landscape)

    def __call__(self, indices: Tensor) -> Tensor:
        return torch.cat([self._stacked(some) for some in torch.split(indices, self.at_once)])

    def narrow(self, columns: Tensor) -> None:
        """Say that some scales cost as much as all."""

    def _stacked(self, indices: Tensor) -> Tensor:
        axis = 2 if self._operand == "lhs" else 3
        shared: Tensor | None = None
        sums: Tensor | None = None
        for (part, target), fixed in zip(self._landscape.parts, self._fixed, strict=True):
            if self._operand == "lhs":
                tried = self.searched.fake_quantize(part.lhs.unsqueeze(axis), indices, axis).flatten(2, 3)
                out = torch.unflatten(torch.matmul(tried, fixed), 2, (len(indices), -1))
            else:
                tried = self._tried_rhs(part, indices) if shared is None else shared
                shared = tried if part.shares_rhs else None
                out = torch.unflatten(torch.matmul(fixed, tried), 3, (len(indices), -1))
            terms = self._sums(part, target.unsqueeze(axis), out, axis)
            sums = terms if sums is None else sums + terms
        assert sums is not None
        return self._landscape.metric.finish(sums).cpu()

    def _tried_rhs(self, part: Product, indices: Tensor) -> Tensor:
        return self.searched.fake_quantize(part.rhs.unsqueeze(3), indices, 3).flatten(3, 4)

    def _sums(self, part: Product, target: Tensor, out: Tensor, axis: int) -> Tensor:
        """Return the metric's sums per scale: (statistics, count, heads, columns)."""
        out = out if part.bias is None else out.add_(part.bias.unsqueeze(-2))
        statistics = (s.expand_as(out) for s in self._landscape.metric.statistics(target, out))
        weight = None if part.element_weight is None else part.element_weight.unsqueeze(axis)
        weighted = [s if weight is None else s * weight for s in statistics]
        totals = torch.stack([w.sum((0, 5 - axis)) for w in weighted])  # (statistics, heads, count, columns)
        return self.searched.groups.reduce(totals.transpose(1, 2).double())


class WeightEvaluation:
    """Squared distances of a weight w beside quantized activations x^, R = diag(weights of the rows).

    The error of the outputs is x^ (w^ - w) + (x^ - x) w, so with d = w^ - w a column's distance is

        d' (x^' R x^) d + 2 d' (x^' R (x^ - x) w) + constant
    """

    def __init__(self, landscape: Landscape, choice: Choice) -> None:
        self.searched = landscape.candidates["rhs"]
        self._weight = landscape.product.rhs
        self.at_once = _stacked_candidates(self._weight.numel(), landscape)
        heads, inner, columns = self._weight.shape[1:]
        self._square = self._weight.new_zeros(1, heads, inner, inner)
        self._linear = self._weight.new_zeros(1, heads, inner, columns)
        self._constant = self._weight.new_zeros(heads, columns, dtype=torch.float64)
        for (part, target), x in zip(landscape.parts, landscape.quantized("lhs", choice["lhs"]), strict=True):
            error = part.output(x, part.rhs).sub_(target)
            weighted = x if part.element_weight is None else x * part.element_weight
            self._square += weighted.mT @ x
            self._linear += (weighted.mT @ error).mul_(2)
            self._constant += part.weighted_squares(error).sum((0, 2)).double()

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


class RoundingEvaluation:
    """What rounding by the Gram matrix will leave of the squared distance of a weight w, about.

    That is the sum of ((w_i' - q_i) / U_ii)^2 over the rows of a column, w' what the rows in front have handed on to
    (rounding.py). Here w stands for w': how a row is rounded is left to chance in both, and where it clips it clips in
    both. Which of two neighbouring scales has the luckier nearest codes is not looked at, as these are not the codes.
    """

    def __init__(self, landscape: Landscape) -> None:
        self.searched = landscape.candidates["rhs"]
        self._weight = landscape.product.rhs
        self.at_once = _stacked_candidates(self._weight.numel(), landscape)
        heads, inner = self._weight.shape[1:3]
        square = self._weight.new_zeros(heads, inner, inner)
        for part, _ in landscape.parts:
            square += (root_weighted(part, part.lhs).mT @ part.lhs)[0]
        self._cost = left_over(square)[None, :, :, None, None]

    def __call__(self, indices: Tensor) -> Tensor:
        return torch.cat([self._stacked(some) for some in torch.split(indices, self.at_once)])

    def _stacked(self, indices: Tensor) -> Tensor:
        weight = self._weight.unsqueeze(3)
        error = self.searched.fake_quantize(weight, indices, 3).sub_(weight).square_().mul_(self._cost)
        return self.searched.groups.reduce(error.sum((0, 2)).double().transpose(0, 1)).cpu()

    def narrow(self, columns: Tensor) -> RoundingEvaluation | None:
        """Return the evaluation of some output channels, if each has a scale."""
        if self.searched.groups != ScaleGroups(1, self._weight.shape[3]):
            return None
        part = copy.copy(self)
        part.searched, part._weight = self.searched.narrow(columns), self._weight[..., columns]
        return part


class ActivationEvaluation:
    """Squared distances of activations x beside a quantized weight w^, all of them with one scale.

    The error of the outputs is (x^ - x) w^ + x (w^ - w), so with d = x^ - x a row's distance is, but for its weight,

        d (w^ w^') d' + 2 d (w^ (w^ - w)' x') + constant
    """

    def __init__(self, landscape: Landscape, choice: Choice) -> None:
        self.searched = landscape.candidates["lhs"]
        self._parts = landscape.parts
        self.at_once = _stacked_candidates(landscape.product.lhs.numel(), landscape)
        weight = next(landscape.quantized("rhs", choice["rhs"]))
        self._square = weight @ weight.mT
        self._linear: list[Tensor] = []
        self._constant = weight.new_zeros((), dtype=torch.float64)
        for part, target in landscape.parts:
            error = part.output(part.lhs, weight).sub_(target)
            self._linear.append((error @ weight.mT).mul_(2))
            self._constant += part.weighted_squares(error).sum(dtype=torch.float64)

    def __call__(self, indices: Tensor) -> Tensor:
        return torch.cat([self._stacked(some) for some in torch.split(indices, self.at_once)])[:, None, None]

    def _stacked(self, indices: Tensor) -> Tensor:
        total = self._constant.expand(len(indices))
        for (part, _), linear in zip(self._parts, self._linear, strict=True):
            x = part.lhs.unsqueeze(2)
            change = self.searched.fake_quantize(x, indices, 2).sub_(x)
            product = torch.unflatten(change.flatten(2, 3) @ self._square, 2, (len(indices), -1))
            rows = product.add_(linear.unsqueeze(2)).mul_(change).sum(-1, keepdim=True)
            rows = rows if part.element_weight is None else rows.mul_(part.element_weight.unsqueeze(2))
            total = total + rows.sum((0, 1, 3, 4), dtype=torch.float64)
        return total.cpu()

    def narrow(self, columns: Tensor) -> None:
        """Say that there is one scale only."""


def _stacked_candidates(elements: int, landscape: Landscape) -> int:
    """Return how many candidates to evaluate at once where one of them computes so many elements."""
    return min(max(1, step_elements(landscape.product.lhs.device) // elements), MOST_STACKED)
