"""Target `generic`: plain QuantizeLinear / DequantizeLinear at any opset, 4-bit weights in 4 bits from opset 21 on.

Sources: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html (int4 from opset 21),
https://onnx.ai/onnx/intro/concepts.html#element-type ("int4": two values per byte, the first in the low half).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.containers import DEQUANTIZE, QUANTIZE, copy_of, forget_types, site_of
from ptq4vit_fx.export.integer_products import qdq_nodes
from ptq4vit_fx.plan import QuantPlan

STANDARD_DOMAINS = {"", "ai.onnx"}
INT4_OPSET = 21
INT4_BITS = 4


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that a model uses."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in STANDARD_DOMAINS)


def rewrite_generic(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """Return a copy whose weights of at most 4 bits are INT4 tensors, from opset 21 on; else a plain copy."""
    copy = copy_of(model)
    if opset_of(copy) < INT4_OPSET:
        return copy
    initializers = {tensor.name: tensor for tensor in copy.graph.initializer}
    for node in copy.graph.node:
        if node.op_type != DEQUANTIZE or node.input[0] not in initializers:
            continue
        if plan.quantizers[site_of(node)].bits > INT4_BITS:
            continue
        for name in (node.input[0], node.input[2]):
            _pack(initializers[name])
    forget_types(copy)
    return copy


def _pack(tensor: onnx.TensorProto) -> None:
    """Turn an int8 tensor with values -8 .. 7 into INT4; a tensor that is INT4 already stays."""
    if tensor.data_type != TensorProto.INT8:
        return
    values = numpy_helper.to_array(tensor).reshape(-1)
    assert values.size == 0 or (values.min() >= -8 and values.max() <= 7)  # codes of at most 4 bits
    halves = np.append(values, np.zeros(values.size % 2, np.int8)).view(np.uint8) & 0x0F
    tensor.data_type = TensorProto.INT4
    tensor.ClearField("int32_data")
    tensor.raw_data = (halves[::2] | halves[1::2] << 4).tobytes()


def check_generic(model: onnx.ModelProto) -> None:
    """Raise PTQError unless every operator is standard and every Q/DQ node has its zero point written out."""
    for node in qdq_nodes(model):
        if node.domain not in STANDARD_DOMAINS:
            raise failure(
                "export_onnx",
                f"node {node.name}",
                expected="a standard operator",
                got=f"{node.domain}::{node.op_type}",
                do="report this as a bug",
            )
        if node.op_type in (QUANTIZE, DEQUANTIZE) and len(node.input) != 3:
            raise failure(
                "export_onnx",
                f"node {node.name}",
                expected="a zero point",
                got="none",
                do="report this as a bug",
            )


def check_types(model: onnx.ModelProto, *, activations: int, weights: int) -> None:
    """Raise PTQError unless every activation and every weight has the integer type that a runtime's kernels want.

    activations, weights: data types of onnx.TensorProto.
    """
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    name_of = TensorProto.DataType.Name
    for node in qdq_nodes(model):
        if node.op_type not in (QUANTIZE, DEQUANTIZE):
            continue
        # A QuantizeLinear of a constant (a table that is multiplied like an activation) is an activation's.
        wanted = weights if node.op_type == DEQUANTIZE and node.input[0] in types else activations
        if types[node.input[2]] != wanted:
            raise failure(
                "export_onnx",
                f"node {node.name}",
                expected=f"{name_of(wanted)} codes",
                got=name_of(types[node.input[2]]),
                do="report this as a bug",
            )
