"""Candidate parameters of one operand: what the search chooses from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ptq4vit_fx.inputs.settings import SearchSettings
from ptq4vit_fx.names import Operand
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.quantizers import (
    NoParams,
    QParams,
    Quantizer,
    TwinParams,
    TwinUniform,
    Uniform,
    UniformParams,
    Unquantized,
)
from ptq4vit_fx.search.products import Product, ScaleGroups, scale_groups, site_params


class Candidates(Protocol):
    """The candidate parameters of one operand. Index `count` is the starting point, beside 0 .. count - 1.

    groups: how many scales are chosen, each by an index of its own. ordered: whether a candidate's distance is near
    those of the candidates beside it, so that a few of them say where to look.
    """

    @property
    def count(self) -> int: ...

    @property
    def groups(self) -> ScaleGroups: ...

    @property
    def ordered(self) -> bool: ...

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


@dataclass(frozen=True)
class UniformCandidates:
    """Scales factor[i] * initial scale, one choice per scale group; initial: (groups.heads, groups.columns)."""

    quantizer: Uniform
    groups: ScaleGroups
    initial: Tensor
    factors: Tensor
    in_graph: Callable[[Tensor], UniformParams]
    ordered: ClassVar[bool] = True

    @staticmethod
    def of(
        quantizer: Uniform, op: QuantOp, product: Product, operand: Operand, settings: SearchSettings
    ) -> UniformCandidates:
        """Return the multiples of the scale that the operand's largest magnitude gives."""
        is_weight, x = operand == "rhs" and op.rhs_is_weight, product.operand(operand)
        groups = scale_groups(quantizer.granularity, quantizer.groups, product, op, is_weight=is_weight)
        factors = torch.tensor([*settings.factors, 1.0], dtype=torch.float32, device=x.device)
        in_graph = partial(site_params, op, groups, product.rhs.shape, is_weight=is_weight)
        return UniformCandidates(quantizer, groups, quantizer.initial_scale(groups.absmax(x)), factors, in_graph)

    @property
    def count(self) -> int:
        return len(self.factors) - 1

    def fake_quantize(self, x: Tensor, indices: Tensor, axis: int | None = None) -> Tensor:
        return self.quantizer.fake_quantize(x, self.params_over(x, indices, axis))

    def params_over(self, x: Tensor, indices: Tensor, axis: int | None = None) -> UniformParams:
        """Return the parameters that `fake_quantize` takes: scales that broadcast over x."""
        scale = self.groups.expand(self._scale(indices), x.shape[1], x.shape[-1])
        return UniformParams(scale if axis is None else scale.movedim(0, axis - 1))

    def params(self, indices: Tensor) -> UniformParams:
        return self.in_graph(self._scale(indices))

    def narrow(self, columns: Tensor) -> UniformCandidates:
        return replace(self, initial=self.initial[:, columns], groups=ScaleGroups(1, len(columns)))

    def _scale(self, indices: Tensor) -> Tensor:
        return self.quantizer.usable(self.factors[indices] * self.initial)


@dataclass(frozen=True)
class TwinCandidates:
    """Thresholds 2^-m (softmax) or coarse scales factor[i] * initial scale (GELU), one choice per tensor."""

    quantizer: TwinUniform
    choices: TwinParams
    groups: ClassVar[ScaleGroups] = ScaleGroups()

    @staticmethod
    def of(
        quantizer: TwinUniform, op: QuantOp, product: Product, operand: Operand, settings: SearchSettings
    ) -> TwinCandidates:
        """Return the thresholds, or the multiples of the scale that the largest value gives."""
        x = product.operand(operand)
        if quantizer.form == "softmax":
            shifts = torch.tensor([*range(settings.max_shift + 1), 0], device=x.device)
            return TwinCandidates(quantizer, quantizer.softmax_params(shifts))
        initial = Uniform(quantizer.bits, signed=not quantizer.wide).initial_scale(x.amax().clamp_min(0))
        coarse = initial * torch.tensor([*settings.factors, 1.0], device=x.device)
        return TwinCandidates(quantizer, quantizer.gelu_params(coarse))

    @property
    def count(self) -> int:
        return len(self.choices.coarse_scale) - 1

    @property
    def ordered(self) -> bool:
        return self.quantizer.form == "gelu"

    def params(self, indices: Tensor) -> TwinParams:
        return self._chosen(indices, ())

    def fake_quantize(self, x: Tensor, indices: Tensor, axis: int | None = None) -> Tensor:
        shape = () if axis is None else (-1, *[1] * (x.ndim - axis - 1))
        return self.quantizer.fake_quantize(x, self._chosen(indices, shape))

    def narrow(self, columns: Tensor) -> TwinCandidates:
        raise NotImplementedError("a twin has one choice per tensor")

    def _chosen(self, indices: Tensor, shape: tuple[int, ...]) -> TwinParams:
        return TwinParams(*(scale[indices.flatten()].view(shape) for scale in self.choices.tensors().values()))


@dataclass(frozen=True)
class Untouched:
    """The operand as it is, the one candidate of an operand that stays float."""

    count: ClassVar[int] = 1
    groups: ClassVar[ScaleGroups] = ScaleGroups()
    ordered: ClassVar[bool] = True

    def fake_quantize(self, x: Tensor, indices: Tensor, axis: int | None = None) -> Tensor:
        shape = list(x.shape)
        if axis is not None:
            shape[axis] = len(indices)
        return x.expand(shape).clone()

    def params(self, indices: Tensor) -> NoParams:
        return NoParams()

    def narrow(self, columns: Tensor) -> Candidates:
        raise NotImplementedError("there is nothing to choose per column")


def make_candidates(
    quantizer: Quantizer, op: QuantOp, product: Product, operand: Operand, settings: SearchSettings
) -> Candidates:
    """Return the candidates of one operand under its quantizer."""
    if isinstance(quantizer, Uniform):
        return UniformCandidates.of(quantizer, op, product, operand, settings)
    if isinstance(quantizer, Unquantized):
        return Untouched()
    return TwinCandidates.of(quantizer, op, product, operand, settings)


def uniform_choice(candidates: Candidates, index: int) -> Tensor:
    """Return the indices (heads, columns) that take candidate `index` for every scale."""
    return torch.full((candidates.groups.heads, candidates.groups.columns), index, dtype=torch.long)
