"""Quantizers: specifications without tensors, and the parameters (tensors) that they need to run.

A quantizer is pure: `codes` maps values to integers, `decode` maps them back, `fake_quantize` is both in one,
bit for bit. Rounding is half-to-even everywhere, as in ONNX `QuantizeLinear`. Codes count steps from zero, which is
always coded exactly; containers of a runtime (uint8 with zero point 128, say) are chosen at lowering.

A kind of quantizer is a file of this folder and an entry of `KINDS`: a frozen dataclass with `bits`, `granularity` and
the methods below, and a class of parameters of its own, a `QParams`. A method raises PTQError on those of another kind.

    codes(x, params)            x, float32 of any shape -> its codes, int32, of that shape
    decode(codes, params)       codes -> their values, float32, of that shape
    fake_quantize(x, params)    decode(codes(x, params), params), without the integer detour
    threshold(params)           where its two ranges meet, None if it has one range
    params_from(tensors, axis)  the parameters whose `tensors()` and `axis` these are
    check(params, place)        raises PTQError on parameters that no calibration gives, whoever made them
    describe()                  a short name for tables
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, cast

from ptq4vit_fx.errors import failure
from ptq4vit_fx.inputs.records import Place, read_as
from ptq4vit_fx.quantizers.kind import FLOAT_BITS, QParams, check_activation_bits, check_bits, usable_scale
from ptq4vit_fx.quantizers.twin import TwinParams, TwinUniform
from ptq4vit_fx.quantizers.uniform import Uniform, UniformParams
from ptq4vit_fx.quantizers.unquantized import NoParams, Unquantized

__all__ = [
    "FLOAT_BITS",
    "KINDS",
    "NoParams",
    "QParams",
    "Quantizer",
    "TwinParams",
    "TwinUniform",
    "Uniform",
    "UniformParams",
    "Unquantized",
    "check_activation_bits",
    "check_bits",
    "describe_quantizer",
    "of_bits",
    "quantizer_from_dict",
    "quantizer_to_dict",
    "usable_scale",
]

Quantizer = Uniform | TwinUniform | Unquantized
KINDS: dict[str, type[Quantizer]] = {kind.__name__: kind for kind in (Uniform, TwinUniform, Unquantized)}


def quantizer_to_dict(quantizer: Quantizer) -> dict[str, Any]:
    """Return a JSON-ready dictionary that `quantizer_from_dict` reads back."""
    return {"kind": type(quantizer).__name__, **asdict(quantizer)}


def quantizer_from_dict(record: Any) -> Quantizer:
    """Return the quantizer of a dictionary; raises PTQError on an unknown kind or field, or another value in one."""
    place = Place("quantizer_from_dict", "record", do="read it with the version that wrote it")
    return cast("Quantizer", read_as(Quantizer, record, place))


def of_bits(quantizer: Quantizer, bits: int) -> Quantizer:
    """Return the same quantizer with so many bits; raises PTQError on one that leaves floats as they are."""
    if isinstance(quantizer, Unquantized):
        do = "start from a recipe that quantizes activations, and set those that stay float to 32 bits"
        raise failure("quantizer", f"{bits} bits", expected="a grid that may have other bits", got="none", do=do)
    return replace(quantizer, bits=bits)


def describe_quantizer(quantizer: Quantizer) -> str:
    """Return a short name such as `uniform8/head` or `twin4/softmax`, for tables."""
    return quantizer.describe()
