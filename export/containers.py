"""Integer containers of activations: the same values behind another integer type and zero point, exactly.

QuantizeLinear computes saturate(round(x / scale) + zero_point), DequantizeLinear (code - zero_point) * scale
(https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html). Moving type and zero point together changes no value
that the new container still holds; where the old one saturated and the new one would not, a Clip does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.contract import rewrite
from ptq4vit_fx.export.nodes import DEQUANTIZE, PAIR, QUANTIZE, Array
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import Uniform, Unquantized


@dataclass(frozen=True)
class Container:
    """An integer type: codes low .. high."""

    kind: ir.DataType
    low: int
    high: int


INT8 = Container(ir.DataType.INT8, -128, 127)
UINT8 = Container(ir.DataType.UINT8, 0, 255)
CONTAINERS = (INT8, UINT8)


@rewrite(nothing="no activation has uint8 codes")
def to_signed(model: ir.Model) -> int:
    """Make the uint8 codes of activations int8, their zero points lowered by 128: no value changes.

    A symmetric grid (zero point 128) gets zero point 0. Codes 0 .. 255 of an unsigned grid or of a twin's branch do not
    fit int8 with zero point 0, so they get zero point -128 (127 for the negatives of a GELU twin).
    """
    return _shift(model, _activation_zero_points(model), UINT8, INT8)


@rewrite(nothing="no activation has int8 codes")
def to_unsigned(model: ir.Model) -> int:
    """Make the int8 codes of activations uint8, zero points raised by 128: the inverse of `to_signed`."""
    return _shift(model, _activation_zero_points(model), INT8, UINT8)


@rewrite(nothing="no weight has int8 codes")
def to_unsigned_weights(model: ir.Model) -> int:
    """Make constant int8 weights uint8, the zero point raised by 128: the same values.

    u8 x u8 kernels are exact on every x86 CPU; those with VNNI run u8 x s8 faster.
    """
    weights = [node for node in model.graph if node.op_type == DEQUANTIZE and nodes.is_constant(node.inputs[0])]
    return _shift(model, [value for node in weights for value in (node.inputs[0], node.inputs[2])], INT8, UINT8)


def _activation_zero_points(model: ir.Model) -> list[ir.Value | None]:
    """Return the zero points of every Q and DQ of activations: of the two, one may have a zero point per head."""
    readers = [node for node in model.graph if node.op_type == DEQUANTIZE and not nodes.is_constant(node.inputs[0])]
    return [node.inputs[2] for node in (*activation_quantizers(model), *readers)]


def _shift(model: ir.Model, values: Iterable[ir.Value | None], old: Container, new: Container) -> int:
    """Move codes and zero points from the lowest code of one type to that of the other; other types stay."""
    moved = [value for value in dict.fromkeys(values) if value is not None and nodes.kind_of(value) == old.kind]
    for value in moved:
        nodes.set_constant(value, (nodes.array(value).astype(np.int16) - old.low + new.low).astype(new.kind.numpy()))
    type_codes(model)
    return len(moved)


def without_zero_points(model: ir.Model, plan: QuantPlan, allowed: tuple[Container, ...]) -> tuple[int, list[str]]:
    """Give activations zero point 0, in place; return how many changed, and the quantizers for which it is impossible.

    allowed: containers in the order of preference. A quantizer is left as it is if it is legal already, or if no
    container holds all codes that its grid uses (0 .. 255 or, of a softmax twin, 0 .. 128 in int8).
    """
    moved, stuck = 0, []
    for node in activation_quantizers(model):
        zero_point = nodes.input_of(node, 2)
        old, offset = _container_of(zero_point), int(nodes.array(zero_point))
        if offset == 0 and old in allowed:
            continue
        low, high = old.low - offset, old.high - offset
        first, last = _used_codes(plan, nodes.scope_of(node), low, high)
        new = next((c for c in allowed if c.low <= first and last <= c.high), None)
        if new is None:
            stuck.append(nodes.name_of(node))
            continue
        _clip(model, node, (low if low > new.low else None, high if high < new.high else None))
        nodes.set_constant(zero_point, np.zeros((), new.kind.numpy()))
        moved += 1
    type_codes(model)
    return moved, stuck


def activation_quantizers(model: ir.Model) -> list[ir.Node]:
    """Return the QuantizeLinear nodes: weights are stored as codes and have none."""
    return [node for node in model.graph if node.op_type == QUANTIZE]


def _used_codes(plan: QuantPlan, branch: str, low: int, high: int) -> tuple[int, int]:
    """Return the smallest and largest code, zero point 0, that this grid uses inside of low .. high."""
    quantizer = plan.quantizers[names.site_of(branch)]
    assert not isinstance(quantizer, Unquantized)  # which no node stands for
    if isinstance(quantizer, Uniform):
        first = -(1 << (quantizer.bits - 1)) if quantizer.signed else low  # unsigned grids start at the container's end
        last = first + quantizer.top
    else:
        negative = quantizer.form == "gelu" and names.range_of(branch) == "fine"
        # Up to 2^(k-1) itself: the fine part of a softmax twin ends at its threshold, see lower_activations.py.
        end = quantizer.steps if quantizer.form == "softmax" else quantizer.levels - 1
        first, last = (-quantizer.steps, 0) if negative else (0, end)
    return max(first, low), min(last, high)


def _clip(model: ir.Model, node: ir.Node, bounds: tuple[int | None, int | None]) -> None:
    """Put a Clip to the values of two codes in front of a QuantizeLinear; exact: such a value divides to its code."""
    if bounds == (None, None):
        return
    scope, scale = nodes.scope_of(node), nodes.array(node.inputs[1])
    limits = [_limit(model, names.tensor(scope, "low"), bounds[0], scale)]
    if bounds[1] is not None:
        limits.append(_limit(model, names.tensor(scope, "high"), bounds[1], scale))
    clip = nodes.new_node("Clip", [node.inputs[0], *limits], names.tensor(scope, "clipped"), names.node(scope, "Clip"))
    node.prepend(clip)
    node.replace_input_with(0, clip.outputs[0])


def _container_of(zero_point: ir.Value) -> Container:
    return next(container for container in CONTAINERS if container.kind == nodes.kind_of(zero_point))


def _limit(model: ir.Model, name: str, code: int | None, scale: Array) -> ir.Value | None:
    return None if code is None else nodes.add_constant(model, name, (np.float32(code) * scale).astype(np.float32))


def type_codes(model: ir.Model) -> None:
    """Record, in place, the type of every activation's codes: that of the zero point they are made and read with."""
    for node in model.graph:
        if node.op_type in PAIR and len(node.inputs) > 2 and (kind := nodes.kind_of(node.inputs[2])) is not None:
            codes = node.outputs[0] if node.op_type == QUANTIZE else nodes.input_of(node, 0)
            if not nodes.is_constant(codes):
                codes.type = ir.TensorType(kind)
