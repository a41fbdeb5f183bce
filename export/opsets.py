"""The same model at another version of ONNX's standard operators: down to 17 here, upwards by onnx's converter."""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper, version_converter

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.containers import DEQUANTIZE, QUANTIZE
from ptq4vit_fx.export.onnx_graph import drop_unused
from ptq4vit_fx.export.targets.generic import opset_of

LOWEST_OPSET = 17
#: The exporter translates these itself; its registry starts at 18, and beyond 23 it only relabels.
TRANSLATED = range(18, 24)
#: Operators that opset 18 changed (https://github.com/onnx/onnx/blob/main/docs/Changelog.md#version-18-of-the-default-onnx-operator-set).
REDUCTIONS = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
CHANGED_IN_18 = REDUCTIONS | {"Split", "Pad", "Resize", "ScatterElements", "ScatterND", "LpPool", "GroupNormalization"}
NEW_IN_18 = frozenset(["BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "Mish"])


def newest_opset() -> int:
    """Return the newest opset that the installed onnx knows."""
    return int(onnx.defs.onnx_opset_version())


def translated_opset(opset: int) -> int:
    """Return the opset to ask the exporter for on the way to `opset`."""
    return min(max(opset, TRANSLATED.start), TRANSLATED.stop - 1)


def at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return a model of `translated_opset(opset)` at `opset`.

    Raises PTQError that names the node if an operator has no equal at opset 17, or the converter's reason.
    """
    for node in model.graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):  # says how floats saturate, and means nothing for integers
            kept = [attribute for attribute in node.attribute if attribute.name != "saturate"]
            del node.attribute[:]
            node.attribute.extend(kept)
    if opset == LOWEST_OPSET:
        return _lower_to_17(model)
    if opset_of(model) != opset:
        try:
            # Upwards, onnx's converter changes what a new version spells differently, and refuses what it cannot.
            model = version_converter.convert_version(model, opset)
        except (RuntimeError, ValueError) as error:
            raise failure(
                "export_onnx",
                f"opset {opset}",
                expected="a model that onnx's version converter can bring there",
                got=str(error).strip().splitlines()[-1],
                do=f"use opset {TRANSLATED.stop - 1} or older",
            ) from error
    assert opset_of(model) == opset
    return model


def _lower_to_17(model: onnx.ModelProto) -> onnx.ModelProto:
    """Spell a model of opset 18 with the operators of opset 17, in place."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in REDUCTIONS:
            _reduce(node, constants)
        elif node.op_type == "Split":
            _split(node)
        elif node.op_type in ("ScatterElements", "ScatterND"):
            _refuse_unless(all(a.name != "reduction" or a.s == b"none" for a in node.attribute), node, "a reduction")
        elif node.op_type == "Pad":
            _refuse_unless(len(node.input) < 4, node, "axes")
        elif node.op_type == "Resize":
            _resize(node)
        else:
            _refuse_unless(node.op_type not in CHANGED_IN_18 | NEW_IN_18, node, node.op_type)
    drop_unused(model)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", LOWEST_OPSET))
    return model


def _reduce(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    """Axes are an attribute in opset 17 and an input in 18; without axes both reduce everything, unless told not to."""
    if len(node.input) < 2 or not node.input[1]:
        idle = any(a.name == "noop_with_empty_axes" and a.i for a in node.attribute)
        _refuse_unless(not idle, node, "noop_with_empty_axes")
    else:
        _refuse_unless(node.input[1] in constants, node, "axes that are computed")
        axes = [int(axis) for axis in numpy_helper.to_array(constants[node.input[1]]).reshape(-1)]
        node.attribute.append(helper.make_attribute("axes", axes))
    del node.input[1:]
    _drop(node, "noop_with_empty_axes")


def _split(node: onnx.NodeProto) -> None:
    """num_outputs is new in 18; without sizes opset 17 splits evenly into as many outputs as the node has."""
    if any(a.name == "num_outputs" for a in node.attribute):
        _refuse_unless(len(node.input) < 2 or not node.input[1], node, "num_outputs beside sizes")
        _drop(node, "num_outputs")


def _resize(node: onnx.NodeProto) -> None:
    """antialias, axes and keep_aspect_ratio_policy are new in 18: only their defaults mean the same in 17."""
    for a in node.attribute:
        usual = (a.name == "antialias" and not a.i) or (a.name == "keep_aspect_ratio_policy" and a.s == b"stretch")
        _refuse_unless(usual or a.name not in ("antialias", "keep_aspect_ratio_policy", "axes"), node, a.name)
    for name in ("antialias", "keep_aspect_ratio_policy"):
        _drop(node, name)


def _drop(node: onnx.NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _refuse_unless(possible: bool, node: onnx.NodeProto, got: str) -> None:
    if not possible:
        raise failure(
            "export_onnx",
            f"node {node.name}",
            expected=f"an operator that opset {LOWEST_OPSET} has",
            got=f"{node.op_type} with {got}" if got != node.op_type else got,
            do="use opset 18 or newer",
        )
