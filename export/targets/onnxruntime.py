"""Targets of ONNX Runtime's CPU provider: x86 with VNNI, x86 without, and ARM.

The runtime makes MatMulIntegerToFloat of every product (`runtime_graph` reads it back): of DequantizeLinear,
DequantizeLinear -> MatMul without a QuantizeLinear behind it
(onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc), and as integer_products.py says with a
bias or scales per head. The three differ in integer types only; every value is the same.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
import onnxruntime

from ptq4vit_fx import names
from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.containers import activation_quantizers, to_signed, to_unsigned_weights
from ptq4vit_fx.export.contract import Target, rewrite
from ptq4vit_fx.export.integer_products import to_integer_products
from ptq4vit_fx.export.model_files import INLINE_BYTES, is_too_large, message_of
from ptq4vit_fx.export.nodes import MOVES, add_constant, array, input_of, maker, name_of, set_constant, users
from ptq4vit_fx.export.opsets import opset_of
from ptq4vit_fx.export.proof.runtime import quiet_options
from ptq4vit_fx.export.split_projections import split_projections
from ptq4vit_fx.export.targets.generic import check_types
from ptq4vit_fx.export.traps import ALONE, BLOCKS, SIXTEEN, check_traps
from ptq4vit_fx.passes.graph.causes import said


@rewrite(nothing="no quantizer stands right behind a division by scales per head that it could do itself")
def divide_along_heads(model: ir.Model) -> int:
    """Quantize operands with scales per head by QuantizeLinear along the heads, in place.

    The division by scales per head in front of a QuantizeLinear is a pass over the operand that the runtime does not
    fuse. QuantizeLinear divides by a scale per index of an axis in its own pass, with the same quotient (its own scale
    is a power of two); the DequantizeLinear keeps its scale, as the product needs one. Where a Clip stands between
    (below 8 bits) both stay. So they do behind a Transpose or another operator that moves values: the runtime
    quantizes in front of it as well (qdq_propagation.cc), which takes longer than the division.
    """
    count = 0
    for quantize in activation_quantizers(model):
        divide = maker(quantize, 0, "Div")
        if divide is None or not names.is_head_scale(name_of(divide.inputs[1])):
            continue
        source = maker(divide, 0)
        if len(users(divide)) == 1 and (source is None or source.op_type not in MOVES):
            _divide_in_quantizer(model, divide, quantize)
            count += 1
    return count


def _divide_in_quantizer(model: ir.Model, divide: ir.Node, quantize: ir.Node) -> None:
    heads = input_of(divide, 1)
    for reader, index in heads.uses():
        if reader is not divide:  # the multiplication behind, where the exporter merged two equal constants
            own = add_constant(model, names.tensor(name_of(reader), "scale"), array(heads))
            reader.replace_input_with(index, own)
    scales, zero_point = array(heads) * array(quantize.inputs[1]), array(quantize.inputs[2])
    set_constant(heads, scales.reshape(-1))
    name = names.tensor(names.owner_of(name_of(heads)), "zero_point")
    zero_points = add_constant(model, name, np.full(scales.size, zero_point))
    for index, value in enumerate((divide.inputs[0], heads, zero_points)):
        quantize.replace_input_with(index, value)
    quantize.attributes.clear()
    quantize.attributes.add(ir.AttrInt64("axis", -scales.ndim))
    model.graph.remove(divide, safe=True)


def check_opens(model: ir.Model, *, activations: ir.DataType, weights: ir.DataType) -> None:
    """Raise PTQError unless `check_types` passes, no trap of its kernels is met, and the installed one opens the model.

    Measured: 0.2 s for a ViT-S, whose export takes 6 s. A model that does not fit into a message is opened without its
    weights, as inputs: every operator is looked up, and memory is not asked for twice.
    """
    check_types(model, activations=activations, weights=weights)
    check_traps(model, (SIXTEEN, ALONE, BLOCKS))
    message = message_of(without_weights(model) if is_too_large(model) else model)
    try:
        onnxruntime.InferenceSession(message.SerializeToString(), quiet_options(), providers=["CPUExecutionProvider"])
    except Exception as error:
        opset, newer = opset_of(model), "Could not find an implementation" in str(error) or "opset" in str(error)
        raise failure(
            "export_onnx",
            f"opset {opset}",
            expected=f"a file that ONNX Runtime {onnxruntime.__version__} opens",
            got=said(error),
            do="use opset 20, the default, or install a newer onnxruntime" if newer else "report this as a bug",
        ) from error


def without_weights(model: ir.Model) -> ir.Model:
    """Return a copy whose constants that need not stay in the model file are inputs."""
    copy = model.clone()
    constants = copy.graph.initializers
    for value in list(constants.values()):
        if value.const_value is None or value.const_value.nbytes <= INLINE_BYTES:
            continue
        del constants[name_of(value)]
        value.const_value = None
        copy.graph.inputs.append(value)
    return copy


check_x86 = partial(check_opens, activations=ir.DataType.UINT8, weights=ir.DataType.INT8)
check_avx2 = partial(check_opens, activations=ir.DataType.UINT8, weights=ir.DataType.UINT8)
check_arm = partial(check_opens, activations=ir.DataType.INT8, weights=ir.DataType.INT8)


#: What all three need. Integer types change before, while every product still reads what DequantizeLinear makes.
FUSED = (
    divide_along_heads,  # first: the others know Q, DQ and products, no division
    split_projections,  # before products are integers: it follows MatMul, Add, Reshape
    to_integer_products,  # last: it ends the form that the others look for
)
#: uint8 activations and int8 weights as they are: the fastest pair with VNNI and AMX. Source:
#: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "Data type selection".
X86 = Target("onnxruntime", FUSED, check_x86, measured=True)
#: uint8 weights: without VNNI the u8 x s8 kernels saturate (same page; `products_saturate`).
AVX2 = Target("onnxruntime-avx2", (to_unsigned_weights, *FUSED), check_avx2, measured=True)
#: int8 activations, symmetric where the grid is: zero point 0 for signed grids. ARM's dot product instructions multiply
#: s8 by s8, and the QDQ fusion allows int8 activations there (QDQIsInt8Allowed in onnxruntime/core/optimizer/
#: qdq_transformer/selectors_actions/qdq_selector_action_transformer.h). Unsigned codes 0 .. 255 do not fit int8 with
#: zero point 0; a zero point of -128 holds the same values at the same cost: a kernel corrects for it once per row.
ARM = Target("onnxruntime-arm", (to_signed, *FUSED), check_arm, measured=True)
