"""No grid: the operand stays float32, beside a weight that has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptq4vit_fx.inputs.records import Place
from ptq4vit_fx.quantizers.kind import FLOAT_BITS, Granularity, QParams, check_kind, named_tensors, own_params


@dataclass(frozen=True)
class NoParams:
    """The parameters of `Unquantized`: none."""

    axis: ClassVar[None] = None

    def tensors(self) -> dict[str, Tensor]:
        """Return no tensor."""
        return {}

    def to(self, device: torch.device) -> NoParams:
        """Return itself: there is nothing to move."""
        return self

    def describe(self) -> str:
        """Return what stands in the place of a scale."""
        return "float"


@dataclass(frozen=True)
class Unquantized:
    """Leaves an operand as it is: activations of a product whose weight alone is quantized. It has no codes."""

    bits: ClassVar[int] = FLOAT_BITS
    granularity: ClassVar[Granularity] = "tensor"

    def codes(self, x: Tensor, params: QParams) -> Tensor:
        """Raise NotImplementedError: what asks for codes has to leave such an operand out."""
        raise NotImplementedError("an operand that is not quantized has no codes")

    def decode(self, codes: Tensor, params: QParams) -> Tensor:
        """Raise NotImplementedError, as `codes` does."""
        raise NotImplementedError("an operand that is not quantized has no codes")

    def fake_quantize(self, x: Tensor, params: QParams) -> Tensor:
        """Return x, a copy of it as every quantizer returns one."""
        own_params(NoParams, params, self)
        return x.clone()

    def threshold(self, params: QParams) -> None:
        """Say that there is one range."""

    def params_from(self, tensors: Mapping[str, Tensor], axis: int | None = None) -> NoParams:
        """Return the parameters with these tensors, of which there must be none."""
        named_tensors(tensors, (), self)
        return NoParams()

    def check(self, params: QParams, place: Place) -> None:
        """Raise PTQError unless these are no parameters."""
        check_kind(NoParams, params, place)

    def describe(self) -> str:
        """Return `float`."""
        return "float"
