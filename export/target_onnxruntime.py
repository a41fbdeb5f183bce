"""Targets of ONNX Runtime's CPU provider: x86 with VNNI, x86 without, and ARM.

All three get DequantizeLinear, DequantizeLinear -> MatMul without a QuantizeLinear behind it, which the runtime fuses
into MatMulIntegerToFloat (onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc, and
`runtime_graph` reads it back). They differ in integer types only; every value is the same.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from ptq4vit_fx.export.containers import to_signed, with_unsigned_weights
from ptq4vit_fx.export.target_generic import check_generic, check_types
from ptq4vit_fx.plan import QuantPlan


def rewrite_x86(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """Return the model as it is: uint8 activations, int8 weights, the fastest pair with VNNI and AMX.

    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "Data type selection".
    """
    return model


def check_x86(model: onnx.ModelProto) -> None:
    check_generic(model)
    check_types(model, activations=TensorProto.UINT8, weights=TensorProto.INT8)


def rewrite_avx2(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """Return a copy with uint8 weights: without VNNI the u8 x s8 kernels saturate (same page; `products_saturate`)."""
    return with_unsigned_weights(model)


def check_avx2(model: onnx.ModelProto) -> None:
    check_generic(model)
    check_types(model, activations=TensorProto.UINT8, weights=TensorProto.UINT8)


def rewrite_arm(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """Return a copy with int8 activations, symmetric where the grid is: zero point 0 for signed grids.

    ARM's dot product instructions multiply s8 by s8, and the QDQ fusion allows int8 activations there
    (QDQIsInt8Allowed in onnxruntime/core/optimizer/qdq_transformer/selectors_actions/
    qdq_selector_action_transformer.h). Unsigned codes 0 .. 255 do not fit int8 with zero point 0; a zero point of -128
    holds the same values at the same cost, because a kernel corrects for a zero point once per row.
    """
    return to_signed(model)


def check_arm(model: onnx.ModelProto) -> None:
    check_generic(model)
    check_types(model, activations=TensorProto.INT8, weights=TensorProto.INT8)
