"""Target `openvino`: zero point 0 wherever two activations are multiplied, one Q and one DQ per operand, 256 levels.

Sources, all in https://github.com/openvinotoolkit/openvino:
- src/common/low_precision_transformations/src/mat_mul.cpp, canBeTransformed: a product of two activations stays float
  if either has a zero point; the weights of a linear layer must have none, its activations may. Measured: with the
  default file's zero points two products of a block run in float, without them none (tests/test_openvino.py).
- the same file, separateInStandaloneBranch: dequantization that several products read is split, as it is written here.
- tests/test_traps.py: OpenVINO 2026.4 computes a division by scales per head, a Clip and a QuantizeLinear wrongly;
  bounds per head in front of the division are computed right (export/division_bounds.py).
- src/plugins/intel_cpu/src/transformations/transformation_pipeline.cpp: precisions of products are u8 or i8 on the
  left and i8 on the right; ONNX QuantizeLinear on 8 bits becomes a FakeQuantize of 256 levels.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.errors import failure, some_names, warn
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.containers import INT8, UINT8, without_zero_points
from ptq4vit_fx.export.contract import Target, rewrite
from ptq4vit_fx.export.division_bounds import bound_in_front_of_division
from ptq4vit_fx.export.gemm_biases import keep_biases_out_of_gemm
from ptq4vit_fx.export.nodes import DEQUANTIZE, PAIR, PRODUCTS, QUANTIZE
from ptq4vit_fx.export.targets.generic import check_generic
from ptq4vit_fx.export.traps import DIVISION, check_traps
from ptq4vit_fx.plan import QuantPlan


@rewrite(nothing="every activation has zero point 0, or multiplies a weight")
def zero_points_to_zero(model: ir.Model, plan: QuantPlan) -> int:
    """Make codes int8 (signed grids) or uint8 (the rest) with zero point 0, in place.

    Codes on both sides of zero that fit neither type (behind GELU) keep their zero point if they multiply a weight.
    Raises PTQError if they are in a product of two activations.
    """
    count, kept = without_zero_points(model, plan, (INT8, UINT8))
    stuck = [name for name in kept if not plan.op(names.product_of(name)).rhs_is_weight]
    if stuck:
        raise failure(
            "export_onnx",
            f"node {stuck[0]}",
            expected="codes that int8 or uint8 holds with zero point 0",
            got=f"codes that need another, in a product of two activations, the first of {len(stuck)}",
            do='use recipes.ptq4vit(twins="exact"), or a target of ONNX Runtime',
        )
    return count


@rewrite(nothing="every DequantizeLinear has one reader and a QuantizeLinear of its own")
def separate_pairs(model: ir.Model) -> int:
    """Give every reader its own DequantizeLinear, and each of those its own QuantizeLinear; in place."""
    separated: Counter[ir.Node] = Counter()  # QuantizeLinear -> how many read it or a copy
    count = 0
    for dequantize in [node for node in model.graph if node.op_type == DEQUANTIZE]:
        source = nodes.maker(dequantize, 0, QUANTIZE)
        for number, (reader, index) in enumerate(dequantize.outputs[0].uses()):
            pair = [_numbered(dequantize, number)]
            if source is not None:
                pair.insert(0, _numbered(source, separated[source]))
                separated[source] += 1
                pair[1].replace_input_with(0, pair[0].outputs[0])
            new = [node for node in pair if node.graph is None]
            dequantize.prepend(new)
            reader.replace_input_with(index, pair[-1].outputs[0])
            count += bool(new)
    return count


def _numbered(node: ir.Node, number: int) -> ir.Node:
    """Return a node itself for number 0, else a copy."""
    if not number:
        return node
    output, name = names.variant(nodes.name_of(node.outputs[0]), number), names.variant(nodes.name_of(node), number)
    copy = nodes.new_node(node.op_type, node.inputs, output, name, **node.attributes)
    copy.outputs[0].type, copy.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    return copy


def check_openvino(model: ir.Model) -> None:
    """Raise PTQError, naming the node, if a rule is broken; warn of products that OpenVINO will compute in float."""
    check_generic(model)
    check_traps(model, (DIVISION,))
    for node in model.graph:
        if node.op_type not in PAIR:
            continue
        places, zero_points = len(node.outputs[0].uses()), nodes.array(node.inputs[2])
        wanted, got = "one reader", f"{places}"
        if nodes.kind_of(node.inputs[2]) not in (INT8.kind, UINT8.kind):
            wanted, got = "8-bit codes (256 levels)", str(zero_points.dtype)
        elif np.any(zero_points) and not _multiplies_weight(node):
            wanted, got = "zero point 0", f"{zero_points.reshape(-1)[0]}"
        if (wanted, got) != ("one reader", "1"):
            raise failure("export_onnx", f"node {node.name}", expected=wanted, got=got, do="report this as a bug")
    unsigned = [str(node.name) for node in model.graph if node.op_type in PRODUCTS and _is_unsigned_on_the_right(node)]
    if unsigned:
        reason = "the second operand has unsigned codes above 127, and OpenVINO multiplies int8 on that side only"
        warn(f"{some_names(unsigned)} will run in float in OpenVINO: {reason}")


def _multiplies_weight(node: ir.Node) -> bool:
    """Return whether these codes are the first operand of products with constant codes."""
    readers = nodes.users(node)
    if readers and all(reader.op_type == DEQUANTIZE for reader in readers):
        return all(_multiplies_weight(reader) for reader in readers)
    rights = [nodes.maker(reader, 1) for reader in readers if reader.op_type in PRODUCTS]
    constant = [right is not None and right is not node and nodes.is_constant(right.inputs[0]) for right in rights]
    return len(constant) == len(readers) and all(constant)


def _is_unsigned_on_the_right(product: ir.Node) -> bool:
    right = nodes.maker(product, 1, DEQUANTIZE)
    return right is not None and nodes.kind_of(right.inputs[2]) == ir.DataType.UINT8


TARGET = Target(
    "openvino",
    (
        zero_points_to_zero,  # first: it puts the Clips there that the next step looks for
        bound_in_front_of_division,  # before pairs are many: one bound for all copies
        separate_pairs,
        keep_biases_out_of_gemm,  # for whoever checks the file in ONNX Runtime; last: it looks at codes
    ),
    check_openvino,
    weights_alone=True,
)
