"""The same model at another version of ONNX's standard operators: down to 17 here, upwards by onnx's converter."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import version_converter

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.contract import rewrite
from ptq4vit_fx.export.nodes import PAIR, array, is_constant

LOWEST_OPSET = 17
#: The exporter translates these itself; its registry starts at 18, and beyond 23 it only relabels.
TRANSLATED = range(18, 24)
STANDARD_DOMAINS = ("", "ai.onnx")
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


def opset_of(model: ir.Model) -> int:
    """Return the version of the standard operators that a model uses."""
    return next(model.opset_imports[domain] for domain in STANDARD_DOMAINS if domain in model.opset_imports)


@rewrite(nothing="no quantizer says how floats saturate")
def drop_saturate(model: ir.Model) -> int:
    """Remove an attribute that opset 17 lacks and that means nothing for integers."""
    dropped = [node.attributes.pop("saturate", None) for node in model.graph if node.op_type in PAIR]
    return len(dropped) - dropped.count(None)


@rewrite(nothing="the exporter writes the format that this opset came with")
def to_file_format(model: ir.Model, opset: int) -> int:
    """Give the file, in place, the oldest version of ONNX's own format that has this opset.

    A runtime refuses a newer format than its own, even where it knows every operator
    (https://onnxruntime.ai/docs/reference/compatibility.html#onnx-opset-support). int4 came with opset 21's.
    """
    before = model.ir_version
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return int(model.ir_version != before)


@rewrite(nothing="the exporter writes this opset itself")
def to_opset(model: ir.Model, opset: int) -> int:
    """Bring a model of `translated_opset(opset)` to `opset`, in place.

    Raises PTQError that names the node if an operator has no equal at opset 17, or the converter's reason.
    """
    if opset == opset_of(model):
        return 0
    if opset == LOWEST_OPSET:
        for node in model.graph:
            _lower_to_17(node)
        model.opset_imports.clear()
        model.opset_imports[""] = LOWEST_OPSET
    else:
        try:
            # Upwards, onnx's converter changes what a new version spells differently, and refuses what it cannot.
            converted = version_converter.convert_version(ir.to_proto(model), opset)
        except (RuntimeError, ValueError) as error:
            raise failure(
                "export_onnx",
                f"opset {opset}",
                expected="a model that onnx's version converter can bring there",
                got=str(error).strip().splitlines()[-1],
                do=f"use opset {TRANSLATED.stop - 1} or older",
            ) from error
        model.graph = ir.from_proto(converted).graph
    assert opset_of(model) == opset
    return len(model.graph)


def _lower_to_17(node: ir.Node) -> None:
    """Spell a node of opset 18 as opset 17 does, in place."""
    attributes = node.attributes
    if node.op_type in REDUCTIONS:
        _reduce(node)
    elif node.op_type == "Split":
        if "num_outputs" in attributes:  # without sizes opset 17 splits evenly into as many outputs as the node has
            _refuse_unless(len(node.inputs) < 2 or node.inputs[1] is None, node, "num_outputs beside sizes")
            del attributes["num_outputs"]
    elif node.op_type in ("ScatterElements", "ScatterND"):
        _refuse_unless(attributes.get_string("reduction", "none") == "none", node, "a reduction")
    elif node.op_type == "Pad":
        _refuse_unless(len(node.inputs) < 4, node, "axes")
    elif node.op_type == "Resize":
        _resize(node)
    else:
        _refuse_unless(node.op_type not in CHANGED_IN_18 | NEW_IN_18, node, node.op_type)


def _reduce(node: ir.Node) -> None:
    """Axes are an attribute in opset 17 and an input in 18; without axes both reduce everything, unless told not to."""
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None:
        _refuse_unless(not node.attributes.get_int("noop_with_empty_axes", 0), node, "noop_with_empty_axes")
    else:
        _refuse_unless(is_constant(axes), node, "axes that are computed")
        node.attributes.add(ir.AttrInt64s("axes", array(axes).reshape(-1).tolist()))
    node.resize_inputs(1)
    node.attributes.pop("noop_with_empty_axes", None)


def _resize(node: ir.Node) -> None:
    """antialias, axes and keep_aspect_ratio_policy are new in 18: only their defaults mean the same in 17."""
    attributes = node.attributes
    _refuse_unless("axes" not in attributes, node, "axes")
    _refuse_unless(not attributes.get_int("antialias", 0), node, "antialias")
    policy = "keep_aspect_ratio_policy"
    _refuse_unless(attributes.get_string(policy, "stretch") == "stretch", node, policy)
    for name in ("antialias", policy):
        attributes.pop(name, None)


def _refuse_unless(possible: bool, node: ir.Node, got: str) -> None:
    if not possible:
        raise failure(
            "export_onnx",
            f"node {node.name}",
            expected=f"an operator that opset {LOWEST_OPSET} has",
            got=f"{node.op_type} with {got}" if got != node.op_type else got,
            do="use opset 18 or newer",
        )
