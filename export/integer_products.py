"""Products with a bias in the form of MatMulInteger, which ONNX Runtime fuses together with the bias, and back.

DequantizeLinear, DequantizeLinear -> MatMul becomes MatMulIntegerToFloat there, but the bias behind it stays an Add, a
pass over the result. MatMulInteger -> Cast -> Mul -> Add becomes one MatMulIntegerToFloat with its bias
(onnxruntime/core/optimizer/matmul_integer_to_float.cc), if the scale is a product that is computed. Two constants
would be multiplied by constant folding before, so the scale of the activation is what DequantizeLinear, which constant
folding leaves alone, makes of one step. The values are the same, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ptq4vit_fx.export.containers import copy_of
from ptq4vit_fx.export.onnx_graph import OnnxGraph, other_input, replace_nodes

#: The constant 1, in codes: dequantized it is the scale.
STEP = "one_step"
CODES = (TensorProto.INT8, TensorProto.UINT8)


def with_integer_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write every product of an activation and a weight with a bias behind it as MatMulInteger; in place, return it.

    Other products have nothing to gain. Names: MatMul, and the nodes beside it, carry the same names with another
    operator in them.
    """
    graph = OnnxGraph(model)
    found = [product for node in graph.nodes if (product := _biased_product(graph, node)) is not None]
    if not found:
        return model
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int32), STEP))
    integer = {id(product.multiply): product for product in found}
    adds = {id(product.add): product for product in found}
    steps: set[int] = set()
    weights: Counter[str] = Counter()
    nodes = []
    for node in graph.nodes:
        if id(node) in integer:
            product = integer[id(node)]
            if id(product.lhs) not in steps:
                steps.add(id(product.lhs))
                inputs, output = [STEP, product.lhs.input[1]], f"{product.lhs.output[0]}.step"
                nodes.append(helper.make_node("DequantizeLinear", inputs, [output], _named(product.lhs, "Step")))
            nodes += _integer_nodes(product, weights[product.rhs.output[0]])
            weights[product.rhs.output[0]] += 1
        else:
            if id(node) in adds:
                node.input[:] = [adds[id(node)].multiply.output[0], adds[id(node)].bias]  # fused in this order alone
            nodes.append(node)
    replace_nodes(model, nodes)
    return model


def with_qdq_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with DequantizeLinear, DequantizeLinear -> MatMul where `with_integer_products` wrote integers."""
    copy = copy_of(model)
    replace_nodes(copy, qdq_nodes(copy))
    return copy


def qdq_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes of `with_qdq_products(model)`, for reading; the model stays as it is."""
    nodes = list(model.graph.node)
    products = {id(product.scaled): product for product in integer_products(nodes)}
    gone = {id(node) for p in products.values() for node in (p.step, p.scales, p.multiply, p.cast)}
    written: list[onnx.NodeProto] = []
    dequantized: set[str] = set()  # some for another reader too
    for node in nodes:
        for kept in _qdq_nodes(products[id(node)]) if id(node) in products else [node] * (id(node) not in gone):
            if kept.op_type != "DequantizeLinear" or kept.output[0] not in dequantized:
                written.append(kept)
            if kept.op_type == "DequantizeLinear":
                dequantized.add(kept.output[0])
    return written


def _qdq_nodes(product: IntegerProduct) -> list[onnx.NodeProto]:
    codes, weight, *zero_points = product.multiply.input
    left = [codes, product.step.input[1], zero_points[0]]
    right = [weight, product.scales.input[1], zero_points[1]]
    values = [product.step.output[0].removesuffix(".step"), product.scales.output[0].rpartition(".scales")[0]]
    names = [_named(product.step, "DequantizeLinear", "Step"), _named(product.scales, "DequantizeLinear")]
    return [
        helper.make_node("DequantizeLinear", left, values[:1], names[0]),
        helper.make_node("DequantizeLinear", right, values[1:], names[1], axis=1),
        helper.make_node("MatMul", values, product.scaled.output, _named(product.multiply, "MatMul")),
    ]


@dataclass(frozen=True)
class IntegerProduct:
    """The nodes that one product became: MatMulInteger, Cast, Mul by the scales, and what computes these."""

    multiply: onnx.NodeProto
    cast: onnx.NodeProto
    scaled: onnx.NodeProto
    scales: onnx.NodeProto
    step: onnx.NodeProto


def integer_products(nodes: Iterable[onnx.NodeProto]) -> Iterator[IntegerProduct]:
    """Yield, from the nodes of a model, what `with_integer_products` wrote; another MatMulInteger has another form."""
    nodes = list(nodes)
    makers = {output: node for node in nodes for output in node.output}
    for scaled in nodes:
        if scaled.op_type != "Mul":
            continue
        cast, scales = (makers.get(name) for name in scaled.input)
        if cast is None or scales is None or cast.op_type != "Cast" or scales.op_type != "Mul":
            continue
        multiply, step = makers.get(cast.input[0]), makers.get(scales.input[0])
        if multiply is None or step is None or step.op_type != "DequantizeLinear" or step.input[0] != STEP:
            continue
        yield IntegerProduct(multiply, cast, scaled, scales, step)


@dataclass(frozen=True)
class _BiasedProduct:
    """A MatMul, the DequantizeLinear of either operand, and the Add behind it."""

    multiply: onnx.NodeProto
    lhs: onnx.NodeProto
    rhs: onnx.NodeProto
    add: onnx.NodeProto
    bias: str


def _biased_product(graph: OnnxGraph, node: onnx.NodeProto) -> _BiasedProduct | None:
    """Return the product that a node is, or None if it is no product that the runtime would fuse with a bias."""
    add = graph.only_user(node, "Add") if node.op_type == "MatMul" else None
    if add is None:
        return None
    lhs, rhs = graph.maker(node, 0), graph.maker(node, 1)
    if lhs is None or rhs is None or {lhs.op_type, rhs.op_type} != {"DequantizeLinear"}:
        return None
    weight, bias = graph.constants.get(rhs.input[0]), other_input(add, node.output[0])
    if weight is None or len(weight.dims) != 2 or weight.data_type not in CODES:
        return None
    if bias not in graph.constants or list(graph.constants[bias].dims) != [weight.dims[1]]:
        return None
    return _BiasedProduct(node, lhs, rhs, add, bias)


def _integer_nodes(product: _BiasedProduct, before: int) -> list[onnx.NodeProto]:
    """Return the nodes of a product, with scales of its own: `before` products have the same weight."""
    number = before or ""
    node, lhs, rhs = product.multiply, product.lhs, product.rhs
    (output,) = node.output
    scales, codes, summed = f"{rhs.output[0]}.scales{number}", f"{output}.codes", f"{output}.sum"
    operands = [lhs.input[0], rhs.input[0], lhs.input[2], rhs.input[2]]
    return [
        helper.make_node("Mul", [f"{lhs.output[0]}.step", rhs.input[1]], [scales], f"{_named(rhs, 'Mul')}{number}"),
        helper.make_node("MatMulInteger", operands, [codes], _named(node, "MatMulInteger")),
        helper.make_node("Cast", [codes], [summed], _named(node, "Cast"), to=TensorProto.FLOAT),
        helper.make_node("Mul", [summed, scales], [output], _named(node, "Mul")),
    ]


def _named(node: onnx.NodeProto, operator: str, old: str = "") -> str:
    """Return the name of a node with another operator in its last part, or behind a name that has none there."""
    old = old or node.op_type
    base, slash, last = node.name.rpartition("/")
    return f"{base}{slash}{last.replace(old, operator, 1)}" if old in last else f"{node.name}/{operator}"
