"""Where an ONNX file keeps each site: the tensor or the constant that holds its integer codes, and its parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.integer_products import in_qdq_form
from ptq4vit_fx.export.metadata import calibrated_scales
from ptq4vit_fx.export.nodes import DEQUANTIZE, PAIR, PRODUCTS, QUANTIZE, Array


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


def stored_sites(model: ir.Model, operation: str = "read sites", file: str = "the file") -> dict[str, StoredSite]:
    """Return site -> where it is; the two branches of a twin are `<site>_fine` and `<site>_coarse`.

    operation, file: what reads them, and from where, for the PTQError that its metadata may end in.

    Equal quantizers of the same values are one pair of nodes in the file, because the exporter merges them: separate
    projections of q, k and v that chose the same scale, for example. Such a site is found through its product.
    """
    graph = in_qdq_form(model).graph
    found: dict[str, StoredSite] = {}
    for node in graph:
        scope = nodes.scope_of(node)
        if node.op_type in PAIR and not all(map(nodes.is_constant, node.inputs[1:])):
            continue  # another program's: its scale is computed
        if node.op_type == DEQUANTIZE and nodes.is_constant(node.inputs[0]):
            if scope in found and names.is_part(nodes.name_of(node)):
                found[scope] = _joined(found[scope], _read(node, node))
            elif scope not in found:
                found[scope] = _read(node, node)
        elif node.op_type == QUANTIZE and scope not in found:
            found[scope] = _read(node, next((user for user in nodes.users(node) if user.op_type == DEQUANTIZE), node))
    for site, name in _through_products(graph).items():
        if name in found:
            found.setdefault(site, found[name])
    for site, scales in calibrated_scales(model.metadata_props, operation, file).items():
        if site in found:
            found[site] = replace(found[site], calibrated=scales)
    return found


def _read(node: ir.Node, dequantize: ir.Node) -> StoredSite:
    scale = nodes.array(dequantize.inputs[1]).astype(np.float32)
    zero_point = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    codes = nodes.array(node.inputs[0]).astype(np.int32) if node.op_type == DEQUANTIZE else None
    return StoredSite(
        tensor=nodes.name_of(node.outputs[0] if codes is None else node.inputs[0]),
        codes=codes,
        scale=scale,
        zero_point=np.zeros(scale.shape, np.int32) if zero_point is None else nodes.array(zero_point).astype(np.int32),
        axis=dequantize.attributes.get_int("axis", 1),
        source=nodes.scope_of(node),
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


def _through_products(graph: ir.Graph) -> dict[str, str]:
    """Return site -> name of the quantizer that its product reads, in the order of the branches."""
    read: dict[str, list[str]] = {}
    for node in graph:
        if node.op_type in PRODUCTS:
            for index, operand in enumerate(names.OPERANDS):
                if (dequantize := nodes.maker(node, index, DEQUANTIZE)) is not None:
                    found = read.setdefault(names.site(nodes.scope_of(node), operand), [])
                    if (name := nodes.scope_of(dequantize)) not in found:
                        found.append(name)
    branches: dict[int, tuple[names.Range | None, ...]] = {1: (None,), 2: names.RANGES}
    return {
        names.branch(site, part): name
        for site, found in read.items()
        for part, name in zip(branches.get(len(found), ()), found, strict=False)
    }


def integers(codes: Array, stored: StoredSite) -> Array:
    """Return codes minus zero point, int32: what they stand for, whatever the container is."""
    shift = stored.zero_point.astype(np.int32)
    if shift.ndim:
        shape = [1] * codes.ndim
        shape[stored.axis] = -1
        shift = shift.reshape(shape)
    return codes.astype(np.int32) - shift
