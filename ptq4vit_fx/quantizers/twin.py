"""Two grids in one code, for what comes out of a softmax or of a GELU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ptq4vit_fx.activations import NEGATIVE_RANGE
from ptq4vit_fx.errors import failure
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

TwinForm = Literal["softmax", "gelu"]


@dataclass(frozen=True)
class TwinParams:
    """Parameters of `TwinUniform`: coarse_scale = 2**shift * fine_scale, shift >= 0.

    Both are float32 of shape (), or while candidates are tried beside each other one that broadcasts over the operand.
    """

    fine_scale: Tensor
    coarse_scale: Tensor
    axis: ClassVar[None] = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the fine and the coarse scale."""
        return {"fine_scale": self.fine_scale, "coarse_scale": self.coarse_scale}

    def to(self, device: torch.device) -> TwinParams:
        """Return the parameters on another device."""
        return TwinParams(self.fine_scale.to(device), self.coarse_scale.to(device))

    def describe(self) -> str:
        """Return the fine and the coarse scale."""
        return f"{float(self.fine_scale):.4g} | {float(self.coarse_scale):.4g}"

    @property
    def shift(self) -> int:
        """m in coarse_scale = 2**m * fine_scale: how far integer hardware shifts the coarse product."""
        return round(math.log2(float(self.coarse_scale) / float(self.fine_scale)))


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
    granularity: ClassVar[Granularity] = "tensor"

    def __post_init__(self) -> None:
        check_bits("TwinUniform", self.bits)
        check_choice("TwinUniform", "form", self.form, get_args(TwinForm))
        if not (self.minimum > 0 or self.form == "softmax") or not 0 <= self.minimum < math.inf:
            expected, do = "above 0, how far below zero the activation goes", "write that, or leave minimum out"
            raise failure("TwinUniform", "minimum", expected=expected, got=repr(self.minimum), do=do)

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
        coarse = usable_scale(coarse_scale.clamp_min(floor), 2 * self.steps)
        ratio = coarse.double() / floor
        shift = torch.floor(torch.log2(ratio) + 1e-9).clamp_min(0)  # the floor as a float32 may be below itself
        return TwinParams((coarse.double() / torch.exp2(shift)).float(), coarse)

    def threshold(self, params: QParams) -> Tensor:
        """Return where the ranges meet: t = steps * fine_scale (softmax) or 0 (gelu)."""
        return own_params(TwinParams, params, self).fine_scale * (self.steps if self.form == "softmax" else 0)

    def codes(self, x: Tensor, params: QParams) -> Tensor:
        """Return int32 codes: of k bits, the range in the top bit; if wide, as the class says."""
        own, top = own_params(TwinParams, params, self), self.levels - 1
        if self.wide and self.form == "softmax":
            fine, coarse = (part.to(torch.int32) for part in self._wide_codes(x, own))
            return fine + coarse
        coarse = torch.round(x / own.coarse_scale).clamp(0, top).to(torch.int32)
        if self.form == "softmax":
            fine = torch.round(x / own.fine_scale).clamp(0, top).to(torch.int32)
            return torch.where(x < self.threshold(own), fine, coarse + self.levels)
        fine = torch.round(x / own.fine_scale).clamp(-self.steps, 0).to(torch.int32)
        return torch.where(fine < 0, fine + 2 * self.levels, coarse)

    def decode(self, codes: Tensor, params: QParams) -> Tensor:
        """Return the float32 values of int32 codes."""
        own = own_params(TwinParams, params, self)
        if self.wide and self.form == "softmax":
            top = self.levels - 1
            fine, coarse = (part.to(torch.float32) for part in (codes.clamp(max=top), (codes - top).clamp(min=0)))
            return fine * own.fine_scale + coarse * own.coarse_scale
        flagged = codes >= self.levels
        if self.form == "softmax":
            scale = torch.where(flagged, own.coarse_scale, own.fine_scale)
            return torch.where(flagged, codes - self.levels, codes).to(scale.dtype) * scale
        scale = torch.where(flagged, own.fine_scale, own.coarse_scale)
        return torch.where(flagged, codes - 2 * self.levels, codes).to(scale.dtype) * scale

    def fake_quantize(self, x: Tensor, params: QParams) -> Tensor:
        """Return decode(codes(x)) without the integer detour (bit-equal)."""
        own, top = own_params(TwinParams, params, self), self.levels - 1
        if self.wide and self.form == "softmax":
            low, high = self._wide_codes(x, own)
            return low.mul_(own.fine_scale).add_(high.mul_(own.coarse_scale))
        coarse = (x / own.coarse_scale).round_().clamp_(0, top).mul_(own.coarse_scale)
        fine = (x / own.fine_scale).round_()
        if self.form == "softmax":
            fine = fine.clamp_(0, top).mul_(own.fine_scale)
            return torch.where(x < self.threshold(own), fine, coarse)
        return fine.clamp_(-self.steps, 0).mul_(own.fine_scale).add_(coarse)

    def params_from(self, tensors: Mapping[str, Tensor], axis: int | None = None) -> TwinParams:
        """Return the parameters with these tensors; a twin has no axis."""
        return TwinParams(**named_tensors(tensors, ("fine_scale", "coarse_scale"), self))

    def check(self, params: QParams, place: Place) -> None:
        """Raise PTQError unless these are scales that the form has: what `softmax_params` or `gelu_params` returns."""
        own = check_kind(TwinParams, params, place)
        for name, scale in own.tensors().items():
            check_scale(scale, 2 * self.steps, place.at(name))
            if scale.ndim:
                raise place.at(name).refusal("a scale of shape ()", f"shape {tuple(scale.shape)}")
        fine, coarse = float(own.fine_scale), float(own.coarse_scale)
        if fine > coarse or math.frexp(fine)[0] != math.frexp(coarse)[0]:
            raise place.refusal("a coarse scale of 2^m fine scales, m >= 0", f"{own.describe()}")
        if self.form == "softmax" and coarse != float(torch.tensor(1.0 / self.steps)):
            raise place.at("coarse_scale").refusal(f"1/{self.steps}, for values up to 1", f"{coarse:.8g}")
        if self.form == "gelu" and fine * self.steps < self.minimum * (1 - 1e-6):
            raise place.at("fine_scale").refusal(f"steps down to {-self.minimum:.4g}", f"{self.steps} of {fine:.4g}")

    def describe(self) -> str:
        """Return a name such as `twin4/softmax`."""
        return f"twin{self.bits}{' wide' if self.wide else ''}/{self.form}"

    def _wide_codes(self, x: Tensor, params: TwinParams) -> tuple[Tensor, Tensor]:
        """Return the codes of both branches of a wide softmax twin, float32: min(x, t) and what is above t."""
        above = x - self.threshold(params)
        branches = ((x, params.fine_scale), (above, params.coarse_scale))
        fine, coarse = ((part / scale).round_().clamp_(0, self.levels - 1) for part, scale in branches)
        return fine, coarse
