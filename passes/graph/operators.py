"""The integer operators of the converted graph: ONNX QuantizeLinear and DequantizeLinear, and the integer product.

Operator specifications: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html and
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html. Export translates each call of these two to one ONNX node,
and writes a product as the DequantizeLinear, DequantizeLinear -> MatMul that a runtime fuses back into it.
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


@torch.library.custom_op("ptq4vit_fx::integer_matmul", mutates_args=())
def integer_matmul(
    lhs: Tensor, lhs_scale: Tensor, lhs_zero_point: Tensor, rhs: Tensor, rhs_scale: Tensor, rhs_zero_point: Tensor
) -> Tensor:
    """Return float32((lhs - lhs_zero_point) @ (rhs - rhs_zero_point)) * (lhs_scale * rhs_scale), summed exactly.

    lhs: uint8 (..., rows, inner), scale and zero point of shape (). rhs: uint8 or int8 (..., inner, columns), scale and
    zero point of shape () or (columns,). This is how an integer kernel with float output computes, to the last bit:
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulIntegerToFloat

    The sum runs in float32, whose matrix product is fast on every device, where each partial sum stays below 2^24 and
    is therefore exact; else in float64.
    """
    left = lhs.float().sub_(lhs_zero_point)
    right = rhs.float().sub_(rhs_zero_point)
    largest_sum = left.abs().amax() * right.abs().sum(-2).amax()
    if largest_sum >= EXACT_FLOAT32:
        left, right = left.double(), right.double()
    return torch.matmul(left, right).float().mul_(lhs_scale * rhs_scale)


#: Integers up to this size are exact in float32.
EXACT_FLOAT32 = 2.0**24


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@integer_matmul.register_fake
def _(
    lhs: Tensor, lhs_scale: Tensor, lhs_zero_point: Tensor, rhs: Tensor, rhs_scale: Tensor, rhs_zero_point: Tensor
) -> Tensor:
    return torch.matmul(lhs.float(), rhs.float())


#: What graphs call and what export translates.
QUANTIZE = torch.ops.ptq4vit_fx.quantize_linear.default
DEQUANTIZE = torch.ops.ptq4vit_fx.dequantize_linear.default
INTEGER_MATMUL = torch.ops.ptq4vit_fx.integer_matmul.default


def _along(parameter: Tensor, axis: int, ndim: int) -> Tensor:
    if parameter.ndim == 0:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.view(shape)
