"""How long a quantized product takes in ONNX Runtime on this machine, as one product and as the two of a twin."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ptq4vit_fx.export.proof.runtime import open_model
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


def measure_product(shapes: ProductShapes) -> tuple[float, float]:
    """Return the median seconds of the product with two branches on its left and with one, run in turn."""
    sessions = [open_model(product_model(shapes, branches)) for branches in (2, 1)]
    feeds = [
        {entry.name: np.random.default_rng(0).random(entry.shape, np.float32) for entry in session.get_inputs()}
        for session in sessions
    ]
    runs = list(zip(sessions, feeds, strict=True))
    started = time.perf_counter()
    for session, feed in runs:
        session.run(None, feed)
    repeats = max(1, round(ROUND_SECONDS / (time.perf_counter() - started)))
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for taken, (session, feed) in zip(seconds, runs, strict=True):
            started = time.perf_counter()
            for _ in range(repeats):
                session.run(None, feed)
            taken.append((time.perf_counter() - started) / repeats)
    two, one = (statistics.median(taken) for taken in seconds)
    return two, one


def product_model(shapes: ProductShapes, branches: int) -> onnx.ModelProto:
    """Return x -> one QuantizeLinear, DequantizeLinear, MatMul per branch, and the sum, on uint8 codes.

    A convolution is written as a linear layer with as many rows as the image has pixels.
    """
    lhs, rhs = shapes.lhs, shapes.rhs
    if shapes.kind == "conv2d":
        lhs, rhs = (1, math.prod(lhs[2:]), math.prod(rhs[1:])), (math.prod(rhs[1:]), rhs[0])
    elif shapes.kind == "linear":
        lhs, rhs = (1, *lhs) if len(lhs) == 2 else lhs, (rhs[1], rhs[0])
    constants = {"scale": np.float32(0.01), "zero": np.uint8(0), "weight_zero": np.int8(0)}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, lhs)]
    nodes = []
    if shapes.rhs_is_weight:
        constants["weight"] = np.random.default_rng(0).integers(-127, 128, rhs).astype(np.int8)
        nodes.append(helper.make_node("DequantizeLinear", ["weight", "scale", "weight_zero"], ["right"]))
    else:
        inputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, rhs))
        nodes += _pair("y", "right", "scale")
    for number in range(branches):
        constants[f"scale{number}"] = np.float32(0.004 + 0.001 * number)
        nodes += _pair("x", f"left{number}", f"scale{number}")
        nodes.append(helper.make_node("MatMul", [f"left{number}", "right"], [f"out{number}"]))
    if branches == 2:
        nodes.append(helper.make_node("Add", ["out0", "out1"], ["out"]))
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    output = helper.make_tensor_value_info("out" if branches == 2 else "out0", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "product", inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _pair(value: str, result: str, scale: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [value, scale, "zero"], [f"{result}.codes"]),
        helper.make_node("DequantizeLinear", [f"{result}.codes", scale, "zero"], [result]),
    ]
