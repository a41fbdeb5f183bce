"""One grid: a scale, and codes that count its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ptq4vit_fx.errors import failure, quoted
from ptq4vit_fx.inputs.records import Place
from ptq4vit_fx.quantizers.kind import (
    Granularity,
    QParams,
    check_bits,
    check_choice,
    check_kind,
    check_scale,
    named_tensors,
    own_params,
    usable_scale,
)


@dataclass(frozen=True)
class UniformParams:
    """Parameters of `Uniform`.

    scale: float32, > 0; with an axis, which counts from the end of the operand if negative, of shape (entries,)
    along it, else of shape () or any other that broadcasts over the operand.
    """

    scale: Tensor
    axis: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the scale."""
        return {"scale": self.scale}

    def to(self, device: torch.device) -> UniformParams:
        """Return the parameters on another device."""
        return UniformParams(self.scale.to(device), self.axis)

    def broadcast(self, ndim: int) -> Tensor:
        """Return the scale shaped so that it broadcasts over an operand with `ndim` dimensions."""
        if self.axis is None:
            return self.scale
        shape = [1] * ndim
        shape[self.axis] = -1
        return self.scale.view(shape)

    def describe(self) -> str:
        """Return the scale, or the range of the scales."""
        if self.scale.ndim == 0:
            return f"{float(self.scale):.4g}"
        return f"{float(self.scale.min()):.4g} .. {float(self.scale.max()):.4g}"


@dataclass(frozen=True)
class Uniform:
    """Uniform quantizer: q = clamp(round(x / scale), -zero_point, 2^k - 1 - zero_point), x^ = scale * q.

    bits: 2 to 8. signed: half of the codes stand below zero (symmetric quantization), else only those that `minimum`
    needs: zero_point = round(minimum / scale) codes for values down to -minimum, a bound that is known beforehand as
    that of GELU is. granularity: one scale per tensor, per head (axis -3 of an attention operand), per output channel
    of a weight, or per group of a weight's rows; `groups` is filled in by annotation (3 for a fused q/k/v projection).

    Raises PTQError on other bits or another granularity, a negative minimum, and a minimum of a signed grid or of
    several scales.
    """

    bits: int = 8
    signed: bool = True
    granularity: Granularity = "tensor"
    groups: int = 1
    minimum: float = 0.0

    def __post_init__(self) -> None:
        check_bits("Uniform", self.bits)
        check_choice("Uniform", "granularity", self.granularity, get_args(Granularity))
        if self.groups < 1:
            do = "leave it out, annotation counts them"
            raise failure("Uniform", "groups", expected="1 or more", got=repr(self.groups), do=do)
        if not 0 <= self.minimum < math.inf or (self.minimum and (self.signed or self.granularity != "tensor")):
            expected = "0 or more, and 0 if signed or if the granularity is not tensor"
            do = "write Uniform(bits, signed=False, minimum=...), or leave minimum out"
            raise failure("Uniform", "minimum", expected=expected, got=repr(self), do=do)

    @property
    def top(self) -> int:
        """The number of the last code, counted from the first: 2^k - 1."""
        return int(2**self.bits - 1)

    def zero_point(self, scale: Tensor) -> Tensor:
        """Return how many codes stand below zero, float32 in the shape of `scale`."""
        if self.signed:
            return torch.full_like(scale, 2 ** (self.bits - 1))
        return torch.round(self.minimum / scale).clamp(0, self.top)

    def initial_scale(self, absmax: Tensor) -> Tensor:
        """Return absmax / 2^(k-1), (absmax + minimum) / 2^k if unsigned: what candidates multiply. Shape of absmax.

        A range of zero gives the scale 1: every value is then coded as zero, exactly.
        """
        scale = absmax / 2 ** (self.bits - 1) if self.signed else (absmax + self.minimum) / 2**self.bits
        return self.usable(torch.where(absmax > 0, scale, torch.ones_like(absmax)))

    def usable(self, scale: Tensor) -> Tensor:
        """Return scales, float32 of any shape, held to normal positive floats whose codes have finite values."""
        return usable_scale(scale, self.top)

    def codes(self, x: Tensor, params: QParams) -> Tensor:
        """Return int32 codes of x."""
        return self._rounded(x, own_params(UniformParams, params, self).broadcast(x.ndim)).to(torch.int32)

    def decode(self, codes: Tensor, params: QParams) -> Tensor:
        """Return the float32 values of int32 codes."""
        scale = own_params(UniformParams, params, self).broadcast(codes.ndim)
        return codes.to(scale.dtype) * scale

    def fake_quantize(self, x: Tensor, params: QParams) -> Tensor:
        """Return decode(codes(x)) without the integer detour (bit-equal: codes are exact in float32)."""
        scale = own_params(UniformParams, params, self).broadcast(x.ndim)
        return self._rounded(x, scale).mul_(scale)

    def threshold(self, params: QParams) -> None:
        """Say that there is one range."""

    def params_from(self, tensors: Mapping[str, Tensor], axis: int | None = None) -> UniformParams:
        """Return the parameters with these tensors."""
        return UniformParams(**named_tensors(tensors, ("scale",), self), axis=axis)

    def check(self, params: QParams, place: Place) -> None:
        """Raise PTQError unless these are a scale without an axis or, if not per tensor, one per entry of an axis."""
        own = check_kind(UniformParams, params, place)
        check_scale(own.scale, self.top, place.at("scale"))
        along = own.scale.ndim == 1 and type(own.axis) is int and self.granularity != "tensor"
        if not along and (own.scale.ndim, own.axis) != (0, None):
            expected = "a scale of shape ()" + ("" if self.granularity == "tensor" else ", or several along an axis")
            raise place.at("scale").refusal(expected, f"shape {tuple(own.scale.shape)}, axis {quoted(own.axis)}")

    def describe(self) -> str:
        """Return a name such as `uniform8/head`."""
        groups = f"[{self.groups}]" if self.granularity == "group" else ""
        below = f" from -{self.minimum:.2g}" if self.minimum else " unsigned"
        return f"uniform{self.bits}{'' if self.signed else below}/{self.granularity}{groups}"

    def _rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        codes = (x / scale).round_()
        if self.minimum:
            below = self.zero_point(scale)
            return codes.clamp_(-below, self.top - below)
        first = -int(2 ** (self.bits - 1)) if self.signed else 0
        return codes.clamp_(first, first + self.top)
