"""Integer containers of activations: the same values behind another integer type and zero point, exactly.

QuantizeLinear computes saturate(round(x / scale) + zero_point), DequantizeLinear (code - zero_point) * scale
(https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html). Moving type and zero point together changes no value
that the new container still holds; where the old one saturated and the new one would not, a Clip does it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import Uniform

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Container:
    """An integer type: codes low .. high."""

    data_type: int
    dtype: type
    low: int
    high: int


INT8 = Container(TensorProto.INT8, np.int8, -128, 127)
UINT8 = Container(TensorProto.UINT8, np.uint8, 0, 255)
CONTAINERS = {container.data_type: container for container in (INT8, UINT8)}


def to_signed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose uint8 activation codes are int8, their zero points lowered by 128: no value changes.

    A symmetric grid (zero point 128) gets zero point 0. Codes 0 .. 255 of an unsigned grid or of a twin's branch do not
    fit int8 with zero point 0, so they get zero point -128 (127 for the negatives of a GELU twin).
    """
    copy = copy_of(model)
    _shift_activations(copy, UINT8, INT8)
    return copy


def to_unsigned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose int8 activation codes are uint8, zero points raised by 128: the inverse of `to_signed`."""
    copy = copy_of(model)
    _shift_activations(copy, INT8, UINT8)
    return copy


def with_unsigned_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose constant int8 weights are uint8 with the zero point raised by 128: the same values.

    u8 x u8 kernels are exact on every x86 CPU; those with VNNI run u8 x s8 faster.
    """
    copy = copy_of(model)
    initializers = {initializer.name: initializer for initializer in copy.graph.initializer}
    for node in copy.graph.node:
        if node.op_type == DEQUANTIZE and node.input[0] in initializers:
            for name in (node.input[0], node.input[2]):
                _shift(initializers[name], INT8, UINT8)
    forget_types(copy)
    return copy


def _shift_activations(model: onnx.ModelProto, old: Container, new: Container) -> None:
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = [node for node in model.graph.node if node.op_type == DEQUANTIZE and node.input[0] not in initializers]
    for node in (*activation_quantizers(model), *readers):  # of the two, one may have a zero point per head
        _shift(initializers[node.input[2]], old, new)
    forget_types(model)


def _shift(tensor: onnx.TensorProto, old: Container, new: Container) -> None:
    """Move codes or a zero point from the lowest code of one type to that of the other; other types stay."""
    if tensor.data_type == old.data_type:
        values = numpy_helper.to_array(tensor).astype(np.int16) - old.low + new.low
        tensor.CopyFrom(numpy_helper.from_array(values.astype(new.dtype), tensor.name))


def without_zero_points(
    model: onnx.ModelProto, plan: QuantPlan, allowed: tuple[Container, ...]
) -> tuple[onnx.ModelProto, list[str]]:
    """Return a copy whose activations have zero point 0, and the names of the quantizers for which that is impossible.

    allowed: containers in the order of preference. A quantizer is left as it is if it is legal already, or if no
    container holds all codes that its grid uses (0 .. 255 or, of a softmax twin, 0 .. 128 in int8).
    """
    copy = copy_of(model)
    initializers = {tensor.name: tensor for tensor in copy.graph.initializer}
    stuck = []
    for node in list(activation_quantizers(copy)):
        zero_point = initializers[node.input[2]]
        old, offset = CONTAINERS[zero_point.data_type], int(numpy_helper.to_array(zero_point))
        if offset == 0 and old in allowed:
            continue
        low, high = old.low - offset, old.high - offset
        first, last = _used_codes(plan, site_of(node), low, high)
        new = next((c for c in allowed if c.low <= first and last <= c.high), None)
        if new is None:
            stuck.append(node.name)
            continue
        bounds = (low if low > new.low else None, high if high < new.high else None)
        _clip(copy, node, bounds, numpy_helper.to_array(initializers[node.input[1]]))
        zero_point.CopyFrom(numpy_helper.from_array(np.zeros((), new.dtype), zero_point.name))
    forget_types(copy)
    return copy, stuck


def activation_quantizers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the QuantizeLinear nodes: weights are stored as codes and have none."""
    return [node for node in model.graph.node if node.op_type == QUANTIZE]


def site_of(node: onnx.NodeProto) -> str:
    """Return the site (with `_fine` or `_coarse` for a twin's branch) in the name of a Q or DQ node."""
    return str(node.name).rsplit("/", 1)[0]


def _used_codes(plan: QuantPlan, branch: str, low: int, high: int) -> tuple[int, int]:
    """Return the smallest and largest code, zero point 0, that this grid uses inside of low .. high."""
    if branch in plan.quantizers:
        quantizer = plan.quantizers[branch]
        assert isinstance(quantizer, Uniform)
        first = -(1 << (quantizer.bits - 1)) if quantizer.signed else low  # unsigned grids start at the container's end
        last = first + quantizer.top
    else:
        site, _, part = branch.rpartition("_")
        quantizer = plan.quantizers[site]
        assert not isinstance(quantizer, Uniform)
        negative = quantizer.form == "gelu" and part == "fine"
        # Up to 2^(k-1) itself: the fine part of a softmax twin ends at its threshold, see lower_activations.py.
        end = quantizer.steps if quantizer.form == "softmax" else quantizer.levels - 1
        first, last = (-quantizer.steps, 0) if negative else (0, end)
    return max(first, low), min(last, high)


def _clip(
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    bounds: tuple[int | None, int | None],
    scale: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> None:
    """Put a Clip to the values of two codes in front of a QuantizeLinear; exact: such a value divides to its code."""
    if bounds == (None, None):
        return
    inputs = [node.input[0]]
    for name, code in zip(("low", "high"), bounds, strict=True):
        if code is None:
            inputs.append("")
            continue
        value = (np.float32(code) * scale).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, f"{site_of(node)}.{name}"))
        inputs.append(f"{site_of(node)}.{name}")
    if not inputs[-1]:
        inputs.pop()
    clipped = f"{site_of(node)}.clipped"
    position = next(i for i, other in enumerate(model.graph.node) if other.name == node.name)
    node.input[0] = clipped
    model.graph.node.insert(position, helper.make_node("Clip", inputs, [clipped], name=f"{site_of(node)}/Clip"))


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that shares nothing."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def forget_types(model: onnx.ModelProto) -> None:
    """Drop the recorded types of codes, which may have changed; the checker infers them again."""
    codes = {name for node in activation_quantizers(model) for name in node.output}
    codes |= {node.input[0] for node in model.graph.node if node.op_type == DEQUANTIZE}
    kept = [value for value in model.graph.value_info if value.name not in codes]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
