"""How long a quantized product takes in ONNX Runtime on this machine, as one product and as the two of a twin."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptq4vit_fx.export.nodes import DEQUANTIZE, QUANTIZE
from ptq4vit_fx.export.proof.runtime import in_turn_options, open_model
from ptq4vit_fx.product_forms import ProductKind

ROUNDS = 7
#: A product is repeated until a round takes about this long.
ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class ProductShapes:
    """A product as the search sees it: the shapes of its operands, and whether the right one is a weight."""

    kind: ProductKind
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    rhs_is_weight: bool


def measure_branches(shapes: ProductShapes, branches: Sequence[int]) -> tuple[float, ...]:
    """Return the median seconds of the product with so many branches on its left, 0 in float, all run in turn.

    Measured: where threads spin between runs, those of one session slow the next one by up to ten times.
    """
    sessions = [open_model(product_model(shapes, number), options=in_turn_options()) for number in branches]
    feeds = [
        {entry.name: np.random.default_rng(0).random(entry.shape, np.float32) for entry in session.get_inputs()}
        for session in sessions
    ]
    runs = list(zip(sessions, feeds, strict=True))
    started = time.perf_counter()
    for session, feed in runs:
        session.run(None, feed)
    repeats = max(1, round(ROUND_SECONDS / (time.perf_counter() - started)))
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for taken, (session, feed) in zip(seconds, runs, strict=True):
            started = time.perf_counter()
            for _ in range(repeats):
                session.run(None, feed)
            taken.append((time.perf_counter() - started) / repeats)
    return tuple(statistics.median(taken) for taken in seconds)


def product_model(shapes: ProductShapes, branches: int) -> ir.Model:
    """Return x -> one QuantizeLinear, DequantizeLinear, MatMul per branch, and the sum, on uint8 codes; 0: in float.

    A convolution is written as a linear layer with as many rows as the image has pixels.
    """
    lhs, rhs = shapes.lhs, shapes.rhs
    if shapes.kind == "conv2d":
        lhs, rhs = (1, math.prod(lhs[2:]), math.prod(rhs[1:])), (math.prod(rhs[1:]), rhs[0])
    elif shapes.kind == "linear":
        lhs, rhs = (1, *lhs) if len(lhs) == 2 else lhs, (rhs[1], rhs[0])
    if not branches:
        return _float_product(lhs, rhs, is_weight=shapes.rhs_is_weight)
    values = {"scale": np.float32(0.01), "zero": np.uint8(0), "weight_zero": np.int8(0)}
    values |= {f"scale{number}": np.float32(0.004 + 0.001 * number) for number in range(branches)}
    if shapes.rhs_is_weight:
        values["weight"] = np.random.default_rng(0).integers(-127, 128, rhs).astype(np.int8)
    constants = {name: ir.val(name, const_value=ir.Tensor(np.asarray(value))) for name, value in values.items()}
    inputs = [ir.val("x", ir.DataType.FLOAT, lhs)]
    if shapes.rhs_is_weight:
        right = [ir.node(DEQUANTIZE, [constants["weight"], constants["scale"], constants["weight_zero"]])]
    else:
        inputs.append(ir.val("y", ir.DataType.FLOAT, rhs))
        right = _pair(inputs[1], constants["scale"], constants["zero"])
    nodes = [*right]
    for number in range(branches):
        left = _pair(inputs[0], constants[f"scale{number}"], constants["zero"])
        nodes += [*left, ir.node("MatMul", [left[-1].outputs[0], right[-1].outputs[0]])]
    if branches == 2:
        nodes.append(ir.node("Add", [node.outputs[0] for node in nodes if node.op_type == "MatMul"]))
    nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, opset_imports={"": 20}, name="product")
    graph.initializers.update(constants)
    return ir.Model(graph, ir_version=9)


def _float_product(lhs: Sequence[int], rhs: Sequence[int], *, is_weight: bool) -> ir.Model:
    """Return x -> MatMul with a weight, or x, y -> MatMul."""
    x, y = ir.val("x", ir.DataType.FLOAT, lhs), ir.val("y", ir.DataType.FLOAT, rhs)
    if is_weight:
        y = ir.val("weight", const_value=ir.Tensor(np.random.default_rng(0).random(rhs, np.float32)))
    node = ir.node("MatMul", [x, y])
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x] if is_weight else [x, y], node.outputs, nodes=[node], opset_imports={"": 20}, name="product")
    graph.initializers.update({"weight": y} if is_weight else {})
    return ir.Model(graph, ir_version=9)


def _pair(value: ir.Value, scale: ir.Value, zero_point: ir.Value) -> list[ir.Node]:
    quantize = ir.node(QUANTIZE, [value, scale, zero_point])
    return [quantize, ir.node(DEQUANTIZE, [quantize.outputs[0], scale, zero_point])]
