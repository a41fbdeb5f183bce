"""Operators that ONNX Runtime lacks in a type of floats: casts around them, and around no other."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from ptq4vit_fx.export.float_types import compute_in_float32
from ptq4vit_fx.export.opsets import LOWEST_OPSET
from ptq4vit_fx.export.proof.runtime import open_model


def model_with(operator: str, kind: ir.DataType, opset: int) -> ir.Model:
    """A float input, cast to another type, one operator of it, cast back."""
    x = ir.val("x", ir.DataType.FLOAT, [3])
    inner = ir.node("Cast", [x], {"to": int(kind)}, outputs=[ir.val("inner", kind, [3])], name="in")
    node = ir.node(operator, [inner.outputs[0]], outputs=[ir.val("result", kind, [3])], name="node")
    to = {"to": int(ir.DataType.FLOAT)}
    back = ir.node("Cast", [node.outputs[0]], to, outputs=[ir.val("y", ir.DataType.FLOAT, [3])], name="out")
    graph = ir.Graph([x], back.outputs, nodes=[inner, node, back], opset_imports={"": opset}, name="g")
    return ir.Model(graph, ir_version=9)


@pytest.mark.parametrize("opset", [LOWEST_OPSET, 20])
@pytest.mark.parametrize(
    ("operator", "kind", "count"),
    [
        ("Erf", ir.DataType.DOUBLE, 1),
        ("Softplus", ir.DataType.DOUBLE, 1),
        ("Tanh", ir.DataType.BFLOAT16, 1),
        ("Tanh", ir.DataType.DOUBLE, 0),
        ("Erf", ir.DataType.FLOAT, 0),
        ("Erf", ir.DataType.FLOAT16, 0),
    ],
)
def test_compute_in_float32(operator, kind, count, opset):
    model = model_with(operator, kind, opset)
    assert compute_in_float32(model).count == count
    x = np.array([-1.0, 0.5, 2.0], np.float32)
    (y,) = open_model(model).run(None, {"x": x})
    (expected,) = open_model(model_with(operator, ir.DataType.FLOAT, opset)).run(None, {"x": x})
    np.testing.assert_allclose(y, expected, rtol=1e-2)
    assert compute_in_float32(model).count == 0


def test_an_output_of_the_model_keeps_its_name_and_type():
    x = ir.val("x", ir.DataType.DOUBLE, [3])
    node = ir.node("Erf", [x], outputs=[ir.val("y", ir.DataType.DOUBLE, [3])], name="node")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=9)
    assert compute_in_float32(model).count == 1
    session = open_model(model)
    assert [(entry.name, entry.type) for entry in session.get_outputs()] == [("y", "tensor(double)")]


def test_an_operator_that_the_runtime_has_in_no_type_is_left_alone():
    model = model_with("Erf", ir.DataType.DOUBLE, 20)
    next(node for node in model.graph if node.name == "node").domain = "unknown.domain"
    assert compute_in_float32(model).count == 0
