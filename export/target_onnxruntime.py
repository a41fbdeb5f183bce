"""Targets of ONNX Runtime's CPU provider: x86 with VNNI, x86 without, and ARM.

All three get DequantizeLinear, DequantizeLinear -> MatMul without a QuantizeLinear behind it, which the runtime fuses
into MatMulIntegerToFloat (onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc, and
`runtime_graph` reads it back). They differ in integer types only; every value is the same.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, numpy_helper

from ptq4vit_fx.export.containers import copy_of, to_signed, with_unsigned_weights
from ptq4vit_fx.export.onnx_graph import OnnxGraph
from ptq4vit_fx.export.target_generic import check_generic, check_types
from ptq4vit_fx.plan import QuantPlan


def with_deep_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which, if the batch is fixed, a bias behind a product has the shape (1, 1, columns).

    MatMul and Add of known shapes become Gemm, for which the runtime has no integer kernel with float output, unless
    the bias has more dimensions than Gemm takes (onnxruntime/core/optimizer/matmul_add_fusion.cc).
    """
    copy = copy_of(model)
    if any(dim.dim_param for value in copy.graph.input for dim in value.type.tensor_type.shape.dim):
        return copy
    graph = OnnxGraph(copy)
    for add in graph.nodes:
        for index, name in enumerate(add.input if add.op_type == "Add" else ()):
            product = graph.maker(add, 1 - index)
            bias = graph.constants.get(name)
            if product is None or product.op_type != "MatMul" or bias is None or len(bias.dims) != 1:
                continue
            deep = numpy_helper.from_array(graph.value(name).reshape(1, 1, -1), f"{add.name}.bias")
            copy.graph.initializer.append(deep)
            add.input[index] = deep.name
    used = {name for node in copy.graph.node for name in node.input}
    kept = [tensor for tensor in copy.graph.initializer if tensor.name in used]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy


def rewrite_x86(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """Return a copy with uint8 activations and int8 weights as they are: the fastest pair with VNNI and AMX.

    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "Data type selection".
    """
    return with_deep_biases(model)


def check_x86(model: onnx.ModelProto) -> None:
    check_generic(model)
    check_types(model, activations=TensorProto.UINT8, weights=TensorProto.INT8)


def rewrite_avx2(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """Return a copy with uint8 weights: without VNNI the u8 x s8 kernels saturate (same page; `products_saturate`)."""
    return with_deep_biases(with_unsigned_weights(model))


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
    return with_deep_biases(to_signed(model))


def check_arm(model: onnx.ModelProto) -> None:
    check_generic(model)
    check_types(model, activations=TensorProto.INT8, weights=TensorProto.INT8)
