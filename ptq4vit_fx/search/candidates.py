"""Candidate parameters of one operand: what the search chooses from."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from ptq4vit_fx.names import Operand
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.qconfig import SearchSettings
from ptq4vit_fx.quantizers import QParams, Quantizer, TwinParams, TwinUniform, Uniform
from ptq4vit_fx.search.products import Product, ScaleGroups, scale_groups, site_params


class Candidates(Protocol):
    """The candidate parameters of one operand. Index `count` is the starting point, beside 0 .. count - 1."""

    count: int
    groups: ScaleGroups
    ordered: bool

    def fake_quantize(self, x: Tensor, indices: Tensor, axis: int | None = None) -> Tensor:
        """Return x, (batch, heads, i, columns), quantized with candidate indices[head, column] for each scale.

        With an axis (2 or 3), indices are (count, heads, columns) and x has a dimension of 1 there, which becomes
        `count`: x quantized with each choice of candidates.
        """
        ...

    def params(self, indices: Tensor) -> QParams:
        """Return the parameters of the chosen candidates."""
        ...

    def narrow(self, columns: Tensor) -> Candidates:
        """Return the candidates of these columns alone; only where every column has a scale."""
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

    def fake_quantize(self, x: Tensor, indices: Tensor, axis: int | None = None) -> Tensor:
        scale = self.groups.expand(self.scales(indices), x.shape[1], x.shape[-1])
        return self.quantizer.fake_quantize(x, scale if axis is None else scale.movedim(0, axis - 1))

    def params(self, indices: Tensor) -> QParams:
        return site_params(self.op, self.groups, self.scales(indices), self.product, is_weight=self.is_weight)

    def narrow(self, columns: Tensor) -> Candidates:
        part = copy.copy(self)
        part.initial, part.groups = self.initial[:, columns], ScaleGroups(1, len(columns))
        return part


class _TwinCandidates:
    """Thresholds 2^-m (softmax) or coarse scales factor[i] * initial scale (GELU), one choice per tensor."""

    groups = ScaleGroups()

    def __init__(self, quantizer: TwinUniform, x: Tensor, settings: SearchSettings) -> None:
        self.quantizer = quantizer
        self.ordered = quantizer.form == "gelu"
        if quantizer.form == "softmax":
            shifts = torch.tensor([*range(settings.max_shift + 1), 0], device=x.device)
            choices = quantizer.softmax_params(shifts)
        else:
            initial = Uniform(quantizer.bits, signed=not quantizer.wide).initial_scale(x.amax().clamp_min(0))
            choices = quantizer.gelu_params(initial * torch.tensor([*settings.factors, 1.0], device=x.device))
        self._scales = (choices.fine_scale, choices.coarse_scale)
        self.count = len(choices.coarse_scale) - 1

    def params(self, indices: Tensor) -> TwinParams:
        return TwinParams(*(scale[indices.view(())] for scale in self._scales))

    def fake_quantize(self, x: Tensor, indices: Tensor, axis: int | None = None) -> Tensor:
        if axis is None:
            return self.quantizer.fake_quantize(x, self.params(indices))
        shape = (-1, *[1] * (x.ndim - axis - 1))
        chosen = TwinParams(*(scale[indices.flatten()].view(shape) for scale in self._scales))
        return self.quantizer.fake_quantize(x, chosen)

    def narrow(self, columns: Tensor) -> Candidates:
        raise NotImplementedError("a twin has one choice per tensor")


def make_candidates(
    quantizer: Quantizer, op: QuantOp, product: Product, operand: Operand, settings: SearchSettings
) -> Candidates:
    """Return the candidates of one operand under its quantizer."""
    if isinstance(quantizer, Uniform):
        return _UniformCandidates(quantizer, op, product, operand, settings)
    return _TwinCandidates(quantizer, product.lhs if operand == "lhs" else product.rhs, settings)


def uniform_choice(candidates: Candidates, index: int) -> Tensor:
    """Return the indices (heads, columns) that take candidate `index` for every scale."""
    return torch.full((candidates.groups.heads, candidates.groups.columns), index, dtype=torch.long)
