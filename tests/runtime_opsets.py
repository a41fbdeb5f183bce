"""Which opsets the installed ONNX Runtime has: not all that the installed onnx has."""

from __future__ import annotations

import functools

import onnx_ir as ir

from ptq4vit_fx.export.opsets import newest_opset
from ptq4vit_fx.export.proof.runtime import open_model


@functools.cache
def newest_in_runtime() -> int:
    """Return the newest opset whose QuantizeLinear the installed ONNX Runtime has: 27 for 1.32, where onnx has 28."""
    opset = newest_opset()
    while opset > 20 and not _quantizes(opset):
        opset -= 1
    return opset


def _quantizes(opset: int) -> bool:
    x, scale = ir.val("x", ir.DataType.FLOAT, [4]), ir.val("scale", const_value=ir.tensor(1.0))
    node = ir.node("QuantizeLinear", [x, scale], outputs=[ir.val("y", ir.DataType.UINT8, [4])])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[scale], opset_imports={"": opset}, name="probe")
    try:
        open_model(ir.Model(graph, ir_version=10))
    except Exception:  # noqa: BLE001 - whatever it raises, it does not open
        return False
    return True
