"""Quantizers: specifications without tensors, and the parameters (tensors) that they need to run.

A quantizer is pure: `codes` maps values to integers, `decode` maps them back, `fake_quantize` is both in one,
bit for bit. Rounding is half-to-even everywhere, as in ONNX `QuantizeLinear`. Codes count steps from zero, which is
always coded exactly; containers of a runtime (uint8 with zero point 128, say) are chosen at lowering.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Literal

import torch
from torch import Tensor

from ptq4vit_fx.activations import NEGATIVE_RANGE
from ptq4vit_fx.errors import failure

Granularity = Literal["tensor", "head", "channel", "group"]
TwinForm = Literal["softmax", "gelu"]


@dataclass(frozen=True)
class UniformParams:
    """Parameters of `Uniform`.

    scale: float32, > 0, shape () or (channels,) along `axis`, which counts from the end of the operand if negative.
    """

    scale: Tensor
    axis: int | None = None

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


@dataclass(frozen=True)
class TwinParams:
    """Parameters of `TwinUniform`: float32 tensors of shape (); coarse_scale = 2**shift * fine_scale, shift >= 0."""

    fine_scale: Tensor
    coarse_scale: Tensor

    def to(self, device: torch.device) -> TwinParams:
        """Return the parameters on another device."""
        return TwinParams(self.fine_scale.to(device), self.coarse_scale.to(device))

    @property
    def shift(self) -> int:
        """m in coarse_scale = 2**m * fine_scale: how far integer hardware shifts the coarse product."""
        return round(math.log2(float(self.coarse_scale) / float(self.fine_scale)))


QParams = UniformParams | TwinParams


@dataclass(frozen=True)
class Uniform:
    """Uniform quantizer: q = clamp(round(x / scale), -zero_point, 2^k - 1 - zero_point), x^ = scale * q.

    bits: 2 to 8. signed: half of the codes stand below zero (symmetric quantization), else only those that `minimum`
    needs: zero_point = round(minimum / scale) codes for values down to -minimum, a bound that is known beforehand as
    that of GELU is. granularity: one scale per tensor, per head (axis -3 of an attention operand), per output channel
    of a weight, or per group of a weight's rows; `groups` is filled in by annotation (3 for a fused q/k/v projection).

    Raises PTQError on other bits, a negative minimum, and a minimum of a signed grid or of several scales.
    """

    bits: int = 8
    signed: bool = True
    granularity: Granularity = "tensor"
    groups: int = 1
    minimum: float = 0.0

    def __post_init__(self) -> None:
        check_bits("Uniform", self.bits)
        if self.minimum < 0 or (self.minimum and (self.signed or self.granularity != "tensor")):
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
        return torch.where(absmax > 0, scale, torch.ones_like(absmax))

    def codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return int32 codes of x; `scale` broadcasts over x."""
        return self._rounded(x, scale).to(torch.int32)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the float32 values of int32 codes."""
        return codes.to(scale.dtype) * scale

    def fake_quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return decode(codes(x)) without the integer detour (bit-equal: codes are exact in float32)."""
        return self._rounded(x, scale).mul_(scale)

    def _rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        codes = (x / scale).round_()
        if self.minimum:
            below = self.zero_point(scale)
            return codes.clamp_(-below, self.top - below)
        first = -int(2 ** (self.bits - 1)) if self.signed else 0
        return codes.clamp_(first, first + self.top)


@dataclass(frozen=True)
class TwinUniform:
    """Two uniform ranges in one k-bit code, for distributions that one grid cannot hold (PTQ4ViT, section 3.2).

    form "softmax" (x in [0, 1]): coarse_scale = 2^-(k-1) is fixed, fine_scale = coarse_scale / 2^m. Values
    below the threshold t = 2^(k-1) * fine_scale = 2^-m take the fine step, the others the coarse one. The top bit
    of the code is 1 in the coarse range.

    form "gelu" (x >= -minimum): negative values take fine_scale, the others coarse_scale. The code is the
    k-bit two's complement of q, so the top bit is 1 in the negative range. fine_scale = coarse_scale / 2^m with
    the largest m >= 0 for which 2^(k-1) * fine_scale still covers `minimum`.

    Each range has 2^(k-1) codes: bits 2 to 8.

    wide: another quantizer than the paper's, with 2^k codes in each range, as many as the container of a branch holds:
    half the steps at the same integer products, but no k-bit code for both. A range is then 2^k - 1 steps long, its end
    is one of its codes, and a softmax value above the threshold t = (2^k - 1) * fine_scale = 2^-m is t plus
    coarse steps of 1 / (2^k - 1). Its code is the sum of both branches' codes; of form "gelu", k + 1 bits.
    """

    bits: int = 8
    form: TwinForm = "softmax"
    minimum: float = NEGATIVE_RANGE["gelu"]
    wide: bool = False

    def __post_init__(self) -> None:
        check_bits("TwinUniform", self.bits)

    @property
    def levels(self) -> int:
        """Codes per range: 2^(k-1), or 2^k if wide."""
        return 1 << (self.bits if self.wide else self.bits - 1)

    @property
    def steps(self) -> int:
        """Steps from one end of a range to the other: 2^(k-1), the last without a code, or 2^k - 1 if wide."""
        return self.levels - 1 if self.wide else self.levels

    def softmax_params(self, shift: Tensor) -> TwinParams:
        """Return the parameters with threshold t = 2^-shift (form "softmax") in the shape of `shift`, integers."""
        coarse = torch.full(shift.shape, 1.0 / self.steps, device=shift.device)
        return TwinParams(coarse / 2**shift, coarse)

    def gelu_params(self, coarse_scale: Tensor) -> TwinParams:
        """Return the parameters for wanted coarse scales, any shape (form "gelu").

        A coarse scale too small to cover the negatives with m = 0 is raised to the smallest that does.
        """
        floor = self.minimum / self.steps
        coarse = coarse_scale.clamp_min(floor)
        ratio = coarse.double() / floor
        shift = torch.floor(torch.log2(ratio) + 1e-9)
        return TwinParams((coarse.double() / torch.exp2(shift)).float(), coarse)

    def threshold(self, params: TwinParams) -> Tensor:
        """Return where the ranges meet: t = steps * fine_scale (softmax) or 0 (gelu)."""
        return params.fine_scale * (self.steps if self.form == "softmax" else 0)

    def codes(self, x: Tensor, params: TwinParams) -> Tensor:
        """Return int32 codes: of k bits, the range in the top bit; if wide, as the class says."""
        top = self.levels - 1
        if self.wide and self.form == "softmax":
            fine, coarse = (part.to(torch.int32) for part in self._wide_codes(x, params))
            return fine + coarse
        coarse = torch.round(x / params.coarse_scale).clamp(0, top).to(torch.int32)
        if self.form == "softmax":
            fine = torch.round(x / params.fine_scale).clamp(0, top).to(torch.int32)
            return torch.where(x < self.threshold(params), fine, coarse + self.levels)
        fine = torch.round(x / params.fine_scale).clamp(-self.steps, 0).to(torch.int32)
        return torch.where(fine < 0, fine + 2 * self.levels, coarse)

    def decode(self, codes: Tensor, params: TwinParams) -> Tensor:
        """Return the float32 values of int32 codes."""
        if self.wide and self.form == "softmax":
            top = self.levels - 1
            fine, coarse = (part.to(torch.float32) for part in (codes.clamp(max=top), (codes - top).clamp(min=0)))
            return fine * params.fine_scale + coarse * params.coarse_scale
        flagged = codes >= self.levels
        if self.form == "softmax":
            scale = torch.where(flagged, params.coarse_scale, params.fine_scale)
            return torch.where(flagged, codes - self.levels, codes).to(scale.dtype) * scale
        scale = torch.where(flagged, params.fine_scale, params.coarse_scale)
        return torch.where(flagged, codes - 2 * self.levels, codes).to(scale.dtype) * scale

    def fake_quantize(self, x: Tensor, params: TwinParams) -> Tensor:
        """Return decode(codes(x)) without the integer detour (bit-equal)."""
        top = self.levels - 1
        if self.wide and self.form == "softmax":
            low, high = self._wide_codes(x, params)
            return low.mul_(params.fine_scale).add_(high.mul_(params.coarse_scale))
        coarse = (x / params.coarse_scale).round_().clamp_(0, top).mul_(params.coarse_scale)
        fine = (x / params.fine_scale).round_()
        if self.form == "softmax":
            fine = fine.clamp_(0, top).mul_(params.fine_scale)
            return torch.where(x < self.threshold(params), fine, coarse)
        return fine.clamp_(-self.steps, 0).mul_(params.fine_scale).add_(coarse)

    def _wide_codes(self, x: Tensor, params: TwinParams) -> tuple[Tensor, Tensor]:
        """Return the codes of both branches of a wide softmax twin, float32: min(x, t) and what is above t."""
        above = x - self.threshold(params)
        branches = ((x, params.fine_scale), (above, params.coarse_scale))
        fine, coarse = ((part / scale).round_().clamp_(0, self.levels - 1) for part, scale in branches)
        return fine, coarse


Quantizer = Uniform | TwinUniform


def fake_quantize(quantizer: Quantizer, x: Tensor, params: QParams) -> Tensor:
    """Return x quantized and decoded: float32, the shape of x.

    Raises PTQError if the parameters belong to another kind of quantizer.
    """
    if isinstance(quantizer, Uniform) and isinstance(params, UniformParams):
        return quantizer.fake_quantize(x, params.broadcast(x.ndim))
    if isinstance(quantizer, TwinUniform) and isinstance(params, TwinParams):
        return quantizer.fake_quantize(x, params)
    raise failure(
        "fake_quantize",
        type(quantizer).__name__,
        expected="parameters of its own kind",
        got=type(params).__name__,
        do="calibrate with the plan that these parameters are meant for",
    )


def check_bits(what: str, bits: int) -> None:
    """Raise PTQError unless bits is an integer from 2 to 8."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise failure(what, "bits", expected="an integer from 2 to 8", got=repr(bits), do="choose 8, 6 or 4")


def quantizer_to_dict(quantizer: Quantizer) -> dict[str, Any]:
    """Return a JSON-ready dictionary that `quantizer_from_dict` reads back."""
    return {"kind": type(quantizer).__name__, **asdict(quantizer)}


def quantizer_from_dict(record: dict[str, Any]) -> Quantizer:
    """Return the quantizer of a dictionary; raises PTQError on an unknown kind or field."""
    kinds: dict[str, type[Uniform] | type[TwinUniform]] = {"Uniform": Uniform, "TwinUniform": TwinUniform}
    fields = dict(record)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise failure(
            "quantizer_from_dict",
            "kind",
            expected=" or ".join(kinds),
            got=repr(kind),
            do="save the plan again with this version",
        )
    unknown = sorted(set(fields) - {field.name for field in dataclass_fields(kinds[kind])})
    if unknown:
        expected, do = "fields that this version knows", "read it with the version that wrote it"
        raise failure("quantizer_from_dict", kind, expected=expected, got=", ".join(unknown), do=do)
    return kinds[kind](**fields)


def describe_quantizer(quantizer: Quantizer) -> str:
    """Return a short name such as `uniform8/head` or `twin4/softmax`, for tables."""
    if isinstance(quantizer, TwinUniform):
        return f"twin{quantizer.bits}{' wide' if quantizer.wide else ''}/{quantizer.form}"
    groups = f"[{quantizer.groups}]" if quantizer.granularity == "group" else ""
    below = f" from -{quantizer.minimum:.2g}" if quantizer.minimum else " unsigned"
    sign = "" if quantizer.signed else below
    return f"uniform{quantizer.bits}{sign}/{quantizer.granularity}{groups}"
