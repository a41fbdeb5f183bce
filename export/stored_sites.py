"""Where an ONNX file keeps each site: the tensor or the constant that holds its integer codes, and its parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ptq4vit_fx.export.naming import HEAD_SCALE
from ptq4vit_fx.export.onnx_graph import PRODUCTS

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class StoredSite:
    """One site, or one branch of a twin, as the file has it.

    tensor: name of the integer tensor, the output of a QuantizeLinear or the name of a constant. codes: the integers of
    a constant, None of an activation. scale: float32, zero_point: int32, both of shape () or (channels,) along `axis`.
    source: what the quantizer carries as its name; another site where two of them were merged. head_scale: scales per
    head, by which the values are divided in front of the quantizer, or by the quantizer; `scale` is 1 then.
    """

    tensor: str
    codes: Array | None
    scale: Array
    zero_point: Array
    axis: int
    source: str
    head_scale: Array | None = None


def stored_sites(model: onnx.ModelProto) -> dict[str, StoredSite]:
    """Return site -> where it is; the two branches of a twin are `<site>_fine` and `<site>_coarse`.

    Equal quantizers of the same values are one pair of nodes in the file, because the exporter merges them: separate
    projections of q, k and v that chose the same scale, for example. Such a site is found through its product.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    found: dict[str, StoredSite] = {}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            name = _name(node)
            is_constant = node.op_type == "DequantizeLinear" and node.input[0] in constants
            if name not in found and (is_constant or node.op_type == "QuantizeLinear"):
                stored, divided = _read(node, constants, is_constant), _head_scale(node, constants, makers)
                if divided is not None:
                    stored = replace(stored, scale=np.ones((), np.float32), head_scale=divided)
                found[name] = stored
    for site, name in _through_products(model, makers).items():
        if name in found:
            found.setdefault(site, found[name])
    return found


def _name(node: onnx.NodeProto) -> str:
    return str(node.name.rpartition("/")[0])


def _read(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], is_constant: bool) -> StoredSite:
    scale = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
    zero = node.input[2] if len(node.input) > 2 else ""
    return StoredSite(
        tensor=node.input[0] if is_constant else node.output[0],
        codes=numpy_helper.to_array(constants[node.input[0]]).astype(np.int32) if is_constant else None,
        scale=scale,
        zero_point=numpy_helper.to_array(constants[zero]).astype(np.int32) if zero else np.zeros(scale.shape, np.int32),
        axis=next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1),
        source=_name(node),
    )


def _head_scale(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], makers: dict[str, onnx.NodeProto]
) -> Array | None:
    """Return the scales per head of a QuantizeLinear or of a division in front of it, past a Clip; None without."""
    if node.input[1].endswith(HEAD_SCALE):
        return numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
    maker = makers.get(node.input[0])
    if maker is not None and maker.op_type == "Clip":
        maker = makers.get(maker.input[0])
    if maker is None or maker.op_type != "Div" or not maker.input[1].endswith(HEAD_SCALE):
        return None
    return numpy_helper.to_array(constants[maker.input[1]]).astype(np.float32)


def _through_products(model: onnx.ModelProto, makers: dict[str, onnx.NodeProto]) -> dict[str, str]:
    """Return site -> name of the quantizer that its product reads, in the order of the branches."""
    read: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            for operand, value in zip(("lhs", "rhs"), node.input, strict=False):
                maker = makers.get(value)
                if maker is not None and maker.op_type == "DequantizeLinear":
                    names = read.setdefault(f"{_name(node)}:{operand}", [])
                    if _name(maker) not in names:
                        names.append(_name(maker))
    branches = {1: ("",), 2: ("_fine", "_coarse")}
    return {
        f"{site}{branch}": name
        for site, names in read.items()
        for branch, name in zip(branches.get(len(names), ()), names, strict=False)
    }


def integers(codes: Array, stored: StoredSite) -> Array:
    """Return codes minus zero point, int32: what they stand for, whatever the container is."""
    shift = stored.zero_point.astype(np.int32)
    if shift.ndim:
        shape = [1] * codes.ndim
        shape[stored.axis] = -1
        shift = shift.reshape(shape)
    return codes.astype(np.int32) - shift
