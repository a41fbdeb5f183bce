"""Target `generic`: plain QuantizeLinear / DequantizeLinear at any opset, 4-bit weights in 4 bits from opset 21 on.

Sources: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html (int4 from opset 21),
https://onnx.ai/onnx/intro/concepts.html#element-type ("int4": two values per byte, the first in the low half).
"""

from __future__ import annotations

import onnx_ir as ir

from ptq4vit_fx.errors import PTQError, failure
from ptq4vit_fx.export.contract import INT4_OPSET, Target, rewrite
from ptq4vit_fx.export.division_bounds import bound_in_front_of_division
from ptq4vit_fx.export.gemm_biases import keep_biases_out_of_gemm
from ptq4vit_fx.export.integer_products import in_qdq_form
from ptq4vit_fx.export.nodes import DEQUANTIZE, PAIR, array, is_constant, kind_of, scope_of, set_constant
from ptq4vit_fx.export.opsets import STANDARD_DOMAINS, opset_of
from ptq4vit_fx.export.traps import DIVISION, check_traps
from ptq4vit_fx.plan import QuantPlan

INT4_BITS = 4


@rewrite(nothing="no weight has at most 4 bits, or the opset is older than 21")
def pack_weights(model: ir.Model, plan: QuantPlan) -> int:
    """Make weights of at most 4 bits INT4 tensors, in place, from opset 21 on."""
    if opset_of(model) < INT4_OPSET:
        return 0
    narrow = [
        node
        for node in model.graph
        if node.op_type == DEQUANTIZE
        and is_constant(node.inputs[0])
        and plan.quantizers[scope_of(node)].bits <= INT4_BITS
    ]
    for value in dict.fromkeys(value for node in narrow for value in (node.inputs[0], node.inputs[2])):
        if value is not None and kind_of(value) == ir.DataType.INT8:
            codes = array(value)
            assert not codes.size or (codes.min() >= -8 and codes.max() <= 7)  # codes of at most 4 bits
            set_constant(value, codes.astype(ir.DataType.INT4.numpy()))
    return len(narrow)


def check_generic(model: ir.Model) -> list[ir.Node]:
    """Raise PTQError unless every operator is standard and every Q/DQ node has its zero point written out.

    Return the nodes in QDQ form.
    """
    nodes = list(in_qdq_form(model).graph)
    for node in nodes:
        if node.domain not in STANDARD_DOMAINS:
            raise _broken(node, "a standard operator", f"{node.domain}::{node.op_type}")
        if node.op_type in PAIR and len(node.inputs) != 3:
            raise _broken(node, "a zero point", "none")
    return nodes


def check_types(model: ir.Model, *, activations: ir.DataType, weights: ir.DataType) -> None:
    """Raise PTQError unless `check_generic` passes, and activations and weights have the integer types of a runtime."""
    for node in check_generic(model):
        # A QuantizeLinear of a constant (a table that is multiplied like an activation) is an activation's.
        wanted = weights if node.op_type == DEQUANTIZE and is_constant(node.inputs[0]) else activations
        if node.op_type in PAIR and (kind := kind_of(node.inputs[2])) != wanted:
            raise _broken(node, f"{wanted.name} codes", "none" if kind is None else kind.name)


def _broken(node: ir.Node, expected: str, got: str) -> PTQError:
    return failure("export_onnx", f"node {node.name}", expected=expected, got=got, do="report this as a bug")


def check_plain(model: ir.Model) -> None:
    """Raise PTQError unless `check_generic` passes and OpenVINO, which may read the file too, computes what it says."""
    check_generic(model)
    check_traps(model, (DIVISION,))


#: Bounds stand in front of divisions for OpenVINO; for every other runtime either form is the same.
STEPS = (pack_weights, bound_in_front_of_division, keep_biases_out_of_gemm)
TARGET = Target("generic", STEPS, check_plain, packed_bits=INT4_BITS, measured=True, weights_alone=True)
