"""Targets of ONNX Runtime's CPU provider: x86 with VNNI, x86 without, and ARM.

The runtime makes MatMulIntegerToFloat of every product (`runtime_graph` reads it back): of DequantizeLinear,
DequantizeLinear -> MatMul without a QuantizeLinear behind it
(onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc), and as integer_products.py says with a
bias or scales per head. The three differ in integer types only; every value is the same.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ptq4vit_fx.export.containers import activation_quantizers, copy_of, to_signed, with_unsigned_weights
from ptq4vit_fx.export.integer_products import with_integer_products
from ptq4vit_fx.export.naming import HEAD_SCALE
from ptq4vit_fx.export.onnx_graph import MOVES, OnnxGraph, drop_unused
from ptq4vit_fx.export.split_projections import with_split_projections
from ptq4vit_fx.export.targets.generic import check_generic, check_types
from ptq4vit_fx.plan import QuantPlan


def with_scales_along_heads(model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize operands with scales per head by QuantizeLinear along the heads; in place, return it.

    The division by scales per head in front of a QuantizeLinear is a pass over the operand that the runtime does not
    fuse. QuantizeLinear divides by a scale per index of an axis in its own pass, with the same quotient (its own scale
    is a power of two); the DequantizeLinear keeps its scale, as the product needs one. Where a Clip stands between
    (below 8 bits) both stay. So they do behind a Transpose or another operator that moves values: the runtime
    quantizes in front of it as well (qdq_propagation.cc), which takes longer than the division.
    """
    graph = OnnxGraph(model)
    for quantize in activation_quantizers(model):
        divide = graph.maker(quantize, 0)
        if divide is None or divide.op_type != "Div" or not divide.input[1].endswith(HEAD_SCALE):
            continue
        source = graph.maker(divide, 0)
        if len(graph.users(divide)) > 1 or (source is not None and source.op_type in MOVES):
            continue
        scales = graph.value(divide.input[1]) * graph.value(quantize.input[1])
        for reader in graph.readers[divide.input[1]]:
            if reader is not divide:  # the multiplication behind, where the exporter merged two equal constants
                _own_constant(model, reader, divide.input[1], graph.value(divide.input[1]))
        zero_points = np.full(scales.size, graph.value(quantize.input[2]))
        graph.constants[divide.input[1]].CopyFrom(numpy_helper.from_array(scales.reshape(-1), divide.input[1]))
        name = divide.input[1].removesuffix("scale") + "zero_point"
        model.graph.initializer.append(numpy_helper.from_array(zero_points, name))
        quantize.input[:] = [*divide.input, name]
        del quantize.attribute[:]
        quantize.attribute.append(helper.make_attribute("axis", -scales.ndim))
        model.graph.node.remove(divide)
    drop_unused(model)  # a constant's old shape
    return model


def _own_constant(model: onnx.ModelProto, node: onnx.NodeProto, name: str, value: NDArray[np.float32]) -> None:
    """Let a node read a copy of a constant, `<node>.scale`, in the place of the constant `name`."""
    model.graph.initializer.append(numpy_helper.from_array(value, f"{node.name}.scale"))
    node.input[list(node.input).index(name)] = f"{node.name}.scale"


def _fixed_batch(model: onnx.ModelProto) -> int | None:
    """Return the number of images that the file is for, None if any."""
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    return None if first.dim_param else int(first.dim_value)


def _rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
    """Do what all three targets need. For one image alone a split costs less than two more products."""
    model = with_scales_along_heads(copy_of(model))
    return with_integer_products(model if _fixed_batch(model) == 1 else with_split_projections(model))


def rewrite_x86(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """Return a copy with uint8 activations and int8 weights as they are: the fastest pair with VNNI and AMX.

    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "Data type selection".
    """
    return _rewrite(model)


def check_x86(model: onnx.ModelProto) -> None:
    check_generic(model)
    check_types(model, activations=TensorProto.UINT8, weights=TensorProto.INT8)


def rewrite_avx2(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """Return a copy with uint8 weights: without VNNI the u8 x s8 kernels saturate (same page; `products_saturate`)."""
    return _rewrite(with_unsigned_weights(model))


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
    return _rewrite(to_signed(model))


def check_arm(model: onnx.ModelProto) -> None:
    check_generic(model)
    check_types(model, activations=TensorProto.INT8, weights=TensorProto.INT8)
