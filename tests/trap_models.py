"""Small ONNX models that meet the traps of runtimes, and what they compute by ONNX's definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

#: Type of codes -> ONNX's type and the largest code of a symmetric grid.
TYPES = {
    "int8": (TensorProto.INT8, 127),
    "int4": (TensorProto.INT4, 7),
    "int16": (TensorProto.INT16, 32767),
}
INNER, COLUMNS, ROWS = 64, 32, 16
#: ONNX Runtime 1.25.1 multiplies 16-bit activations by 8-bit weights in float.
sixteen_by_eight = pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32), reason="an older ONNX Runtime has not this trap"
)


@dataclass(frozen=True)
class Product:
    """A model `y = x @ w`, an x (batch, ROWS, INNER), and the exact y."""

    model: ir.Model
    values: np.ndarray
    exact: np.ndarray

    def error(self, y: np.ndarray) -> float:
        """Return the relative error of a result."""
        return float(np.linalg.norm(y - self.exact) / np.linalg.norm(self.exact))


def quantized_product(activation: str | None, weight: str, block: int | None = None) -> Product:
    """Return a product of codes of such types (None: of floats) in QDQ form, weights per channel or per block."""
    random = np.random.default_rng(0)
    x = random.standard_normal((1, ROWS, INNER)).astype(np.float32)
    w = (0.05 * random.standard_normal((INNER, COLUMNS))).astype(np.float32)
    kind, top = TYPES[weight]
    rows = block or INNER
    scale = (np.abs(w.reshape(-1, rows, COLUMNS)).max(1) / top).astype(np.float32)
    codes = np.rint(w / scale.repeat(rows, 0)).astype(np.int64)
    value = codes * scale.repeat(rows, 0).astype(np.float64)
    scale = scale if block else scale[0]
    constants = [
        numpy_helper.from_array(scale, "s"),
        helper.make_tensor("w", kind, codes.shape, codes.ravel().tolist()),
        helper.make_tensor("z", kind, scale.shape, [0] * scale.size),
    ]
    axis: dict[str, Any] = {"axis": 0, "block_size": block} if block else {"axis": 1}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["dw"], "fc:rhs/DequantizeLinear", **axis),
        helper.make_node("MatMul", ["x" if activation is None else "dx", "dw"], ["y"], "fc/MatMul"),
    ]
    seen = x.astype(np.float64)
    if activation is not None:
        kind, top = TYPES[activation]
        step = np.float32(np.abs(x).max() / top)
        seen = np.rint(x / step) * np.float64(step)
        constants += [numpy_helper.from_array(step, "sx"), helper.make_tensor("zx", kind, [], [0])]
        pair = (("QuantizeLinear", "x", "q"), ("DequantizeLinear", "q", "dx"))
        nodes[:0] = [helper.make_node(op, [a, "sx", "zx"], [b], f"fc:lhs/{op}") for op, a, b in pair]
    return Product(_model(nodes, constants, ["batch", ROWS, INNER], ["batch", ROWS, COLUMNS]), x, seen @ value)


def division_and_clip(scales: np.ndarray) -> ir.Model:
    """Return x / scales -> Clip to 6 bits -> codes -> y, of shape (batch, 2, 8, 8)."""
    nodes = [
        helper.make_node("Div", ["x", "scales"], ["d"], name="d"),
        helper.make_node("Clip", ["d", "low", "high"], ["c"], name="c"),
        helper.make_node("QuantizeLinear", ["c", "one", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["y"], name="y"),
    ]
    names = {"scales": scales, "low": np.float32(-32), "high": np.float32(31), "one": np.float32(1), "zero": np.int8(0)}
    return _model(nodes, [numpy_helper.from_array(v, k) for k, v in names.items()], ["b", 2, 8, 8], ["b", 2, 8, 8])


def _model(nodes: list[Any], constants: list[Any], x: list[Any], y: list[Any]) -> ir.Model:
    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.FLOAT, x)], [value("y", TensorProto.FLOAT, y)]
    graph = helper.make_graph(nodes, "g", *ends, constants)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
