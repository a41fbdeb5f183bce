"""Operands of extreme magnitude, searched at an ordinary one: float32 holds no square of 1e30 and none of 1e-30.

Dividing an operand, and whatever its quantizer is told of its values, by a power of two changes no code. Distances of
operands that are neither very large nor very small are finite as they are; those operands stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from ptq4vit_fx.names import Operand
from ptq4vit_fx.quantizers import QParams, Quantizer, TwinUniform, Unquantized
from ptq4vit_fx.search.products import Product

#: Largest magnitudes from 2^-20 to 2^20 are ordinary: errors of products are then within 2^-60 and 2^60.
ORDINARY = 20
#: More is never divided by: what is left is ordinary enough, and scales stay normal floats.
MOST = 100


def exponents_of(product: Product, quantizers: Mapping[Operand, Quantizer]) -> dict[Operand, int]:
    """Return e per operand, whose values are to be divided by 2^e: 0 of all ordinary ones, and behind a softmax."""
    return {operand: _exponent(product, operand, quantizer) for operand, quantizer in quantizers.items()}


def _exponent(product: Product, operand: Operand, quantizer: Quantizer) -> int:
    low, high = (float(bound) for bound in torch.aminmax(product.operand(operand)))
    exponent = math.frexp(max(-low, high))[1]  # 0 of zero
    if abs(exponent) <= ORDINARY or (isinstance(quantizer, TwinUniform) and quantizer.form == "softmax"):
        return 0
    return max(-MOST, min(exponent, MOST))


def divided(product: Product, exponents: Mapping[Operand, int]) -> Product:
    """Return the product with each operand divided by 2^e.

    Its bias goes, if any e is not 0: it is in the float output as in the quantized one, and may have no place beside
    the divided products.
    """
    if not any(exponents.values()):
        return product
    lhs, rhs = (product.operand(operand) * math.ldexp(1.0, -exponents[operand]) for operand in ("lhs", "rhs"))
    return replace(product, lhs=lhs, rhs=rhs, bias=None)


def divided_quantizer(quantizer: Quantizer, exponent: int) -> Quantizer:
    """Return the quantizer of values that were divided by 2^exponent: the lowest of them is divided too."""
    if not exponent or isinstance(quantizer, Unquantized):
        return quantizer
    return replace(quantizer, minimum=math.ldexp(quantizer.minimum, -exponent))


def multiplied(quantizer: Quantizer, params: QParams, exponent: int) -> QParams:
    """Return the parameters of the operand as it was: its scales times 2^exponent, usable ones."""
    if not exponent or isinstance(quantizer, Unquantized):
        return params
    scales = {name: scale * math.ldexp(1.0, exponent) for name, scale in params.tensors().items()}
    if isinstance(quantizer, TwinUniform):
        return quantizer.gelu_params(scales["coarse_scale"])  # the fine scale as before: minimum and scale moved alike
    return quantizer.params_from({name: quantizer.usable(scale) for name, scale in scales.items()}, params.axis)
