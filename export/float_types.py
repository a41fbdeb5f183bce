"""Operators that ONNX Runtime does not have in double or bfloat16: they compute in float32, between two casts."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export.contract import rewrite
from ptq4vit_fx.export.nodes import name_of
from ptq4vit_fx.export.proof.runtime import open_model

#: Half is none of them: the runtime casts it by itself.
OTHER_FLOATS = (ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
FLOAT = ir.DataType.FLOAT
IN_FLOAT32 = dict.fromkeys(OTHER_FLOATS, FLOAT)
#: Attributes that hold graphs: what is in them is not looked at.
GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@rewrite(nothing="ONNX Runtime has every operator of the file in the type that it computes in")
def compute_in_float32(model: ir.Model) -> int:
    """Put casts, in place, around operators that ONNX Runtime has in float32 but not in their own type of floats.

    What it has is asked of the runtime, operator by operator: its documentation lists types of one version.
    """
    found = [node for node in model.graph if _computes_otherwise(node)]
    lacking = [node for node in found if not _is_known(model, node, {}) and _is_known(model, node, IN_FLOAT32)]
    for node in lacking:
        _cast_around(model, node)
    return len(lacking)


def _computes_otherwise(node: ir.Node) -> bool:
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if node.op_type == "Cast" or any(attribute.type in GRAPHS for attribute in node.attributes.values()):
        return False
    return all(value.dtype for value in values) and any(value.dtype in OTHER_FLOATS for value in values)


def _is_known(model: ir.Model, node: ir.Node, types: dict[ir.DataType, ir.DataType]) -> bool:
    """Return whether the runtime opens a model of this operator alone, with these types in the place of others."""

    def like(value: ir.Value | None, name: str) -> ir.Value | None:
        kind = None if value is None else cast("ir.DataType", value.dtype)
        return None if value is None or kind is None else ir.val(name, types.get(kind, kind), value.shape)

    inputs = [like(value, f"x{number}") for number, value in enumerate(node.inputs)]
    outputs = [like(value, f"y{number}") for number, value in enumerate(node.outputs)]
    results = [value for value in outputs if value is not None]
    kind = (node.domain, node.op_type)
    alone = ir.Node(*kind, inputs, list(node.attributes.values()), overload=node.overload, outputs=results)
    given = [value for value in inputs if value is not None]
    graph = ir.Graph(given, results, nodes=[alone], opset_imports=dict(model.opset_imports), name="probe")
    try:
        open_model(ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values())), threads=1)
    except Exception:  # noqa: BLE001 - of whichever type: the runtime does not take it
        return False
    return True


def _cast_around(model: ir.Model, node: ir.Node) -> None:
    for number, value in enumerate(node.inputs):
        if value is not None and value.dtype in OTHER_FLOATS:
            before = _cast(value, FLOAT, names.node(name_of(node), "Cast", number))
            before.outputs[0].name = names.variant(name_of(node), f"float32_{number}")
            model.graph.insert_before(node, before)
            node.replace_input_with(number, before.outputs[0])
    for number, value in enumerate(node.outputs):
        kind = value.dtype
        if kind in OTHER_FLOATS:
            behind = _cast(value, kind, names.node(name_of(node), "CastBack", number))
            value.replace_all_uses_with(behind.outputs[0], replace_graph_outputs=True)
            behind.replace_input_with(0, value)
            behind.outputs[0].name, value.name = value.name, names.variant(name_of(value), "float32")
            value.dtype = FLOAT
            model.graph.insert_after(node, behind)


def _cast(value: ir.Value, kind: ir.DataType, name: str) -> ir.Node:
    """Return a cast of a value, whose result has the same shape and no name yet."""
    return ir.node("Cast", [value], {"to": int(kind)}, outputs=[ir.val(None, kind, value.shape)], name=name)
