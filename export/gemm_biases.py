"""Biases that ONNX Runtime does not draw into a Gemm where that would make the file impossible to open.

On x86, ONNX Runtime opens a file with int8 activations of opset 21 or newer in steps that trust each other (all in
onnxruntime/core/optimizer; 1.32 stops with "output_dtype INT8 does not match y_zero_point type UINT8"):
matmul_add_fusion.cc makes Reshape -> Gemm -> Reshape of MatMul -> Add where every size is known, as with a fixed batch;
qdq_propagation.cc moves the DequantizeLinear behind that Reshape, and gives the QuantizeLinear that it adds the
attribute output_dtype of opset 21; qdq_s8_to_u8.cc makes the pair uint8 and leaves the attribute at INT8. Where the
first has to reshape it takes biases of one dimension only: with two, (1, columns), the values are the same and the
MatMul stays.
"""

from __future__ import annotations

import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.contract import rewrite

#: The first opset whose QuantizeLinear has an output_dtype.
OUTPUT_DTYPE_OPSET = 21


@rewrite(nothing="no bias stands right behind a MatMul, or the opset is older than 21")
def keep_biases_out_of_gemm(model: ir.Model, opset: int) -> int:
    """Give every bias right behind a MatMul two dimensions, (1, columns), in place, from opset 21 on."""
    if opset < OUTPUT_DTYPE_OPSET:
        return 0
    count = 0
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        add = nodes.only_user(product, "Add")
        bias = None if add is None else nodes.other_input(add, product.outputs[0])
        if add is None or bias is None or not nodes.is_constant(bias) or nodes.array(bias).ndim != 1:
            continue
        _make_row(model, add, bias)
        count += 1
    return count


def _make_row(model: ir.Model, add: ir.Node, bias: ir.Value) -> None:
    """Give the bias of an Add a dimension in front; one that others read too stays theirs as it is."""
    row = nodes.array(bias)[None]
    if len(bias.uses()) == 1 and not bias.is_graph_output():
        nodes.set_constant(bias, row)
        return
    own = nodes.add_constant(model, names.variant(nodes.name_of(add), "bias"), row)
    add.replace_input_with(list(add.inputs).index(bias), own)
