"""Biases that ONNX Runtime does not draw into a Gemm.

Where every size is known, as with a fixed batch, matmul_add_fusion.cc makes Reshape -> Gemm -> Reshape of MatMul -> Add
if the bias has one dimension, before integers are looked for (all of this is in onnxruntime/core/optimizer, 1.32).
- A Gemm of dequantized operands stays float: measured, 8 of 14 products of a block, which MatMulIntegerToFloat
  multiplies without the fusion, and the last bit of the result is another.
- On x86, with int8 activations of opset 21 or newer, the file does not open: qdq_propagation.cc moves the
  DequantizeLinear behind the Reshape, and gives the QuantizeLinear that it adds the attribute output_dtype of opset 21;
  qdq_s8_to_u8.cc makes the pair uint8 and leaves the attribute ("output_dtype INT8 does not match y_zero_point type
  UINT8"). A batch that is fixed when the file is opened (add_free_dimension_override_by_name) does the same.
With a bias of two dimensions, (1, columns), the values are the same and the MatMul stays.
"""

from __future__ import annotations

import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.contract import rewrite
from ptq4vit_fx.export.nodes import DEQUANTIZE

#: The first opset whose QuantizeLinear has an output_dtype.
OUTPUT_DTYPE_OPSET = 21


@rewrite(nothing="no bias stands behind a product that ONNX Runtime would make a Gemm of")
def keep_biases_out_of_gemm(model: ir.Model, opset: int) -> int:
    """Give biases right behind a MatMul two dimensions, (1, columns), in place.

    These are the biases of products of known sizes, and from opset 21 on of all products of int8 activations.
    """
    count = 0
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        add = nodes.only_user(product, "Add")
        bias = None if add is None else nodes.other_input(add, product.outputs[0])
        if add is None or bias is None or not nodes.is_constant(bias) or nodes.array(bias).ndim != 1:
            continue
        if _has_known_sizes(product) or (opset >= OUTPUT_DTYPE_OPSET and _is_int8(product)):
            _make_row(model, add, bias)
            count += 1
    return count


def _has_known_sizes(product: ir.Node) -> bool:
    shape = nodes.input_of(product, 0).shape
    return shape is not None and all(isinstance(size, int) for size in shape)


def _is_int8(product: ir.Node) -> bool:
    dequantize = nodes.maker(product, 0, DEQUANTIZE)
    return dequantize is not None and nodes.kind_of(dequantize.inputs[2]) == ir.DataType.INT8


def _make_row(model: ir.Model, add: ir.Node, bias: ir.Value) -> None:
    """Give the bias of an Add a dimension in front; one that others read too stays theirs as it is."""
    row = nodes.array(bias)[None]
    if len(bias.uses()) == 1 and not bias.is_graph_output():
        nodes.set_constant(bias, row)
        return
    own = nodes.add_constant(model, names.variant(nodes.name_of(add), "bias"), row)
    add.replace_input_with(list(add.inputs).index(bias), own)
