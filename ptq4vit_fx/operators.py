"""ONNX QuantizeLinear and DequantizeLinear as torch operators: the converted graph is written in them.

Operator specifications: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html and
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html. Export translates each call to one ONNX node.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("ptq4vit_fx::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return saturate(round_half_to_even(x / scale) + zero_point) in the integer type of zero_point.

    x: float32. scale: float32, shape () or (channels,) along `axis`. zero_point: uint8 or int8, shape of scale.
    """
    limits = torch.iinfo(zero_point.dtype)
    codes = x / _along(scale, axis, x.ndim)
    codes.round_().add_(_along(zero_point, axis, x.ndim)).clamp_(limits.min, limits.max)
    return codes.to(zero_point.dtype)


@torch.library.custom_op("ptq4vit_fx::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return (codes - zero_point) * scale as float32; shapes as in quantize_linear."""
    centred = codes.to(scale.dtype).sub_(_along(zero_point, axis, codes.ndim))
    return centred.mul_(_along(scale, axis, codes.ndim))


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


#: What graphs call and what export translates.
QUANTIZE = torch.ops.ptq4vit_fx.quantize_linear.default
DEQUANTIZE = torch.ops.ptq4vit_fx.dequantize_linear.default


def _along(parameter: Tensor, axis: int, ndim: int) -> Tensor:
    if parameter.ndim == 0:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.view(shape)
