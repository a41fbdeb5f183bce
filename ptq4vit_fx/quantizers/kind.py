"""What every kind of quantizer has: parameters with one interface, and the checks that they are its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ptq4vit_fx.errors import PTQError, failure, unknown_name
from ptq4vit_fx.inputs.records import Place

#: How many scales an operand has: one, one per head (axis -3), per output channel, or per group of output channels.
Granularity = Literal["tensor", "head", "channel", "group"]


#: What stands for float32 where bits of activations are asked for.
FLOAT_BITS = 32


class QParams(Protocol):
    """The tensors that a quantizer needs to run, and along which dimension of the operand they lie."""

    @property
    def axis(self) -> int | None:
        """The dimension of the operand that has a scale per entry; None if the tensors broadcast as they are."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, in the order in which files and fingerprints hold them."""
        ...

    def to(self, device: torch.device) -> QParams:
        """Return the parameters on another device."""
        ...

    def describe(self) -> str:
        """Return the scales in few characters."""
        ...


Own = TypeVar("Own", bound=QParams)


def usable_scale(scale: Tensor, steps: int) -> Tensor:
    """Return scales, float32 of any shape, held to those that a quantizer can count with: every scale comes from here.

    A usable scale is a normal positive float of which `steps` are a finite one. Dividing a finite value by it gives no
    NaN, no code times it is infinite, and no hardware takes it for zero. The upper bound is a power of two: scales at
    it stay powers of two apart. What is in between is returned as it is, bit for bit.
    """
    return scale.clamp(torch.finfo(torch.float32).tiny, math.ldexp(1.0, 127 - steps.bit_length()))


def own_params(kind: type[Own], params: QParams, quantizer: object) -> Own:
    """Return the parameters; raises PTQError if they are not of the kind that the quantizer needs."""
    if isinstance(params, kind):
        return params
    raise _of_another_kind(quantizer, kind.__name__, type(params).__name__)


def named_tensors(tensors: Mapping[str, Tensor], names: tuple[str, ...], quantizer: object) -> dict[str, Tensor]:
    """Return the tensors; raises PTQError if they have not these names or have others."""
    if sorted(tensors) == sorted(names):
        return dict(tensors)
    raise _of_another_kind(quantizer, " and ".join(names), " and ".join(tensors) or "none")


def _of_another_kind(quantizer: object, expected: str, got: str) -> PTQError:
    do = "calibrate with the plan that these parameters are meant for"
    return failure(type(quantizer).__name__, "parameters", expected=expected, got=got, do=do)


def check_bits(what: str, bits: int) -> None:
    """Raise PTQError unless bits is an integer from 2 to 8."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise failure(what, "bits", expected="an integer from 2 to 8", got=repr(bits), do="choose 8, 6 or 4")


def check_activation_bits(what: str, bits: int) -> None:
    """Raise PTQError unless bits is an integer from 2 to 8, or 32, which leaves activations float."""
    if bits != FLOAT_BITS or isinstance(bits, bool):
        check_bits(what, bits)


def check_choice(what: str, field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise PTQError unless a field has one of its values."""
    if value not in choices:
        raise unknown_name(what, field, value, choices)


def check_kind(kind: type[Own], params: QParams, place: Place) -> Own:
    """Return the parameters; raises PTQError that names the place if they are not of the quantizer's kind."""
    if isinstance(params, kind):
        return params
    raise place.refusal(kind.__name__, type(params).__name__)


def check_scale(scale: Tensor, most: int, place: Place) -> None:
    """Raise PTQError unless scales are float32, positive, normal, and `most` steps of the largest a finite float32.

    A denormal scale has fewer bits than its codes need, and hardware may take it for zero.
    """
    if not isinstance(scale, Tensor):
        raise place.refusal("float32 scales", type(scale).__name__)
    if scale.dtype is not torch.float32 or scale.numel() == 0 or scale.is_meta or scale.layout is not torch.strided:
        raise place.refusal("float32 scales", f"{scale.dtype} of shape {tuple(scale.shape)}, {scale.device.type}")
    limits = torch.finfo(torch.float32)
    low, high = (float(bound) for bound in torch.aminmax(scale.detach()))
    if not (low >= limits.tiny and high * most <= limits.max):
        expected = f"normal positive scales, of which {most} steps are a finite float32"
        raise place.refusal(expected, f"{low:.4g} to {high:.4g}" if low < high else f"{low:.4g}")
