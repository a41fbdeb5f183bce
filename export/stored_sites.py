"""Where an ONNX file keeps each site: the tensor or the constant that holds its integer codes, and its parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ptq4vit_fx.export.integer_products import qdq_nodes
from ptq4vit_fx.export.metadata import calibrated_scales
from ptq4vit_fx.export.onnx_graph import PRODUCTS
from ptq4vit_fx.export.split_projections import PART

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class StoredSite:
    """One site, or one branch of a twin, as the file has it.

    tensor: name of the integer tensor, the output of a QuantizeLinear or the name of a constant. codes: the integers of
    a constant, None of an activation. scale: float32, zero_point: int32, both of shape () or (channels,) along `axis`:
    what the DequantizeLinear has. source: what the quantizer carries as its name; another site where two of them were
    merged. calibrated: the scales of the calibration, shape (count,), where `scale` is another because the file divides
    by scales per head in front of the quantizer, in it, or in the weights of a projection.
    """

    tensor: str
    codes: Array | None
    scale: Array
    zero_point: Array
    axis: int
    source: str
    calibrated: Array | None = None


def stored_sites(model: onnx.ModelProto) -> dict[str, StoredSite]:
    """Return site -> where it is; the two branches of a twin are `<site>_fine` and `<site>_coarse`.

    Equal quantizers of the same values are one pair of nodes in the file, because the exporter merges them: separate
    projections of q, k and v that chose the same scale, for example. Such a site is found through its product.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = qdq_nodes(model)
    readers = {node.input[0]: node for node in nodes if node.op_type == "DequantizeLinear"}
    found: dict[str, StoredSite] = {}
    for node in nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            name = _name(node)
            is_constant = node.op_type == "DequantizeLinear" and node.input[0] in constants
            if is_constant and name in found and PART in node.name:
                found[name] = _joined(found[name], _read(node, node, constants, is_constant))
            elif name not in found and (is_constant or node.op_type == "QuantizeLinear"):
                found[name] = _read(node, readers.get(node.output[0], node), constants, is_constant)
    for site, name in _through_products(nodes).items():
        if name in found:
            found.setdefault(site, found[name])
    for site, scales in calibrated_scales(model).items():
        if site in found:
            found[site] = replace(found[site], calibrated=scales)
    return found


def _name(node: onnx.NodeProto) -> str:
    return str(node.name.rpartition("/")[0])


def _read(
    node: onnx.NodeProto, dequantize: onnx.NodeProto, constants: dict[str, onnx.TensorProto], is_constant: bool
) -> StoredSite:
    scale = numpy_helper.to_array(constants[dequantize.input[1]]).astype(np.float32)
    zero = dequantize.input[2] if len(dequantize.input) > 2 else ""
    return StoredSite(
        tensor=node.input[0] if is_constant else node.output[0],
        codes=numpy_helper.to_array(constants[node.input[0]]).astype(np.int32) if is_constant else None,
        scale=scale,
        zero_point=numpy_helper.to_array(constants[zero]).astype(np.int32) if zero else np.zeros(scale.shape, np.int32),
        axis=next((attribute.i for attribute in dequantize.attribute if attribute.name == "axis"), 1),
        source=_name(node),
    )


def _joined(first: StoredSite, second: StoredSite) -> StoredSite:
    """Return a weight that the file holds in parts, as columns of one matrix (split_projections.py)."""
    assert first.codes is not None
    assert second.codes is not None
    codes = np.concatenate([first.codes, second.codes], axis=-1)
    if not first.scale.ndim:
        return replace(first, codes=codes)
    scale = np.concatenate([first.scale, second.scale])
    zero_point = np.concatenate([first.zero_point, second.zero_point])
    return replace(first, codes=codes, scale=scale, zero_point=zero_point)


def _through_products(nodes: list[onnx.NodeProto]) -> dict[str, str]:
    """Return site -> name of the quantizer that its product reads, in the order of the branches."""
    makers = {output: node for node in nodes for output in node.output}
    read: dict[str, list[str]] = {}
    for node in nodes:
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
