"""Products in the form of MatMulInteger, which ONNX Runtime fuses together with what is behind them, and back.

DequantizeLinear, DequantizeLinear -> MatMul becomes MatMulIntegerToFloat there, but the bias of a linear layer and the
scales per head of attention stay an Add and a Mul, each a pass over the result. MatMulInteger -> Cast -> Mul -> Add
becomes one MatMulIntegerToFloat with its bias (onnxruntime/core/optimizer/matmul_integer_to_float.cc), and the scale of
its right operand may be one per column of every matrix (IsBQuantParamSupported in onnxruntime/core/providers/cpu/
quantization/matmul_integer_base.h), if the scale is a product that is computed. Two constants would be multiplied by
constant folding before, so the scale of an activation is what DequantizeLinear, which constant folding leaves alone,
makes of one step. The values are the same, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ptq4vit_fx.export.containers import copy_of
from ptq4vit_fx.export.onnx_graph import OnnxGraph, other_input, replace_nodes

#: The constant 1, in codes: dequantized it is the scale.
STEP = "one_step"
CODES = (TensorProto.INT8, TensorProto.UINT8)


def with_integer_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write as MatMulInteger, in place, what the runtime then fuses with the node behind it; return the model.

    These are products of an activation and a weight with a bias behind them, and of two activations with scales per
    head. Others have nothing to gain. Names: MatMul, and the nodes beside it, carry the same names with another
    operator in them.
    """
    graph = OnnxGraph(model)
    shapes = {value.name: value.type.tensor_type.shape for value in model.graph.value_info}
    both = ((node, _biased_product(graph, node) or _product_per_head(graph, shapes, node)) for node in graph.nodes)
    found = {id(node): product for node, product in both if product is not None}
    if not found:
        return model
    writer = _Writer(model, graph)
    for node in graph.nodes:
        if id(node) in found:
            writer.write(found[id(node)])
        else:
            writer.nodes.append(node)
    replace_nodes(model, writer.nodes)
    return model


def with_qdq_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with DequantizeLinear, DequantizeLinear -> MatMul where `with_integer_products` wrote integers.

    Right operands that had equal scales have one constant for them then.
    """
    copy = copy_of(model)
    replace_nodes(copy, qdq_nodes(copy))
    return copy


def qdq_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes of `with_qdq_products(model)`, for reading; the model stays as it is."""
    nodes = list(model.graph.node)
    products = {id(product.scaled): product for product in integer_products(nodes)}
    gone = {id(node) for p in products.values() for node in p.computed}
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
    per_head = product.per_head
    codes, right_codes, *zero_points = product.multiply.input
    left = [codes, product.step.input[1], zero_points[0]]
    right = [right_codes, (per_head.step if per_head else product.scales).input[1], zero_points[1]]
    values = [product.step.output[0].removesuffix(".step"), product.scales.output[0].rpartition(".scales")[0]]
    names = [_named(product.step, "DequantizeLinear", "Step"), _named(product.scales, "DequantizeLinear")]
    axis = None if per_head else 1  # of no meaning for one scale
    result = product.multiply.output[0].removesuffix(".codes")
    nodes = [
        helper.make_node("DequantizeLinear", left, values[:1], names[0]),
        helper.make_node("DequantizeLinear", right, values[1:], names[1], axis=axis),
        helper.make_node("MatMul", values, [result], _named(product.multiply, "MatMul")),
    ]
    if per_head:
        inputs = [result, per_head.multiply.input[1]]
        nodes.append(helper.make_node("Mul", inputs, product.scaled.output, product.scaled.name))
    return nodes


@dataclass(frozen=True)
class PerHead:
    """The nodes of a scale per head and column: the Mul by the heads, and the right scale, expanded to the columns.

    shape: what computes the shape to expand to, none where the number of images is known.
    """

    multiply: onnx.NodeProto
    expand: onnx.NodeProto
    step: onnx.NodeProto
    shape: tuple[onnx.NodeProto, ...]


@dataclass(frozen=True)
class IntegerProduct:
    """The nodes that one product became: MatMulInteger, Cast, Mul by the scales, and what computes these.

    per_head: None if the right operand is a weight, whose scales are a constant. Products share some of its nodes.
    """

    multiply: onnx.NodeProto
    cast: onnx.NodeProto
    scaled: onnx.NodeProto
    scales: onnx.NodeProto
    step: onnx.NodeProto
    per_head: PerHead | None

    @property
    def computed(self) -> list[onnx.NodeProto]:
        """Every node but the last, `scaled`."""
        nodes = [self.multiply, self.cast, self.scales, self.step]
        if self.per_head is not None:
            nodes += [self.per_head.multiply, self.per_head.expand, self.per_head.step, *self.per_head.shape]
        return nodes


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
        yield IntegerProduct(multiply, cast, scaled, scales, step, _per_head(makers, scales))


def _per_head(makers: dict[str, onnx.NodeProto], scales: onnx.NodeProto) -> PerHead | None:
    multiply = makers.get(scales.input[1])
    if multiply is None:
        return None
    expand = makers[multiply.input[0]]
    concat = makers.get(expand.input[1])
    shape = () if concat is None else (concat, makers[concat.input[0]])
    return PerHead(multiply, expand, makers[expand.input[0]], shape)


@dataclass(frozen=True)
class _Product:
    """A MatMul, the DequantizeLinear of either operand, the node behind it, and the constant that this reads.

    behind: an Add of a bias, or a Mul by a scale per head; then `shape` is that of the right operand, the first of it a
    name if the number of images is not known.
    """

    multiply: onnx.NodeProto
    lhs: onnx.NodeProto
    rhs: onnx.NodeProto
    behind: onnx.NodeProto
    constant: str
    shape: tuple[int | str, ...] = ()


def _biased_product(graph: OnnxGraph, node: onnx.NodeProto) -> _Product | None:
    """Return the product of a weight that a node is, or None if it is none that the runtime would fuse with a bias."""
    product = _product(graph, node, "Add")
    if product is None:
        return None
    weight, bias = graph.constants.get(product.rhs.input[0]), graph.constants[product.constant]
    if weight is None or len(weight.dims) != 2 or weight.data_type not in CODES:
        return None
    return product if list(bias.dims) == [weight.dims[1]] else None


def _product_per_head(
    graph: OnnxGraph, shapes: dict[str, onnx.TensorShapeProto], node: onnx.NodeProto
) -> _Product | None:
    """Return the product of two activations that a node is, or None if its scales per head cannot go into it.

    They can if one number stands for a whole matrix, if the quantizers' own scales are powers of two, so that another
    order of the multiplications changes no bit, and if the shape of the right operand is known up to the images.
    """
    product = _product(graph, node, "Mul")
    if product is None or product.rhs.input[0] in graph.constants:
        return None
    quantize = graph.maker(product.rhs, 0)
    if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.input[0] not in shapes:
        return None
    shape = [dim.dim_param or dim.dim_value for dim in shapes[quantize.input[0]].dim]
    known = len(shape) > 2 and shape[0] and all(isinstance(size, int) and size for size in shape[1:])
    dims = list(graph.constants[product.constant].dims)
    scale = [1] * (len(shape) - len(dims)) + dims
    if not known or len(scale) > len(shape) or [scale[0], *scale[-2:]] != [1, 1, 1]:
        return None
    if any(count not in (1, size) for count, size in zip(scale, shape, strict=True)):
        return None
    own = [graph.value(dequantize.input[1]) for dequantize in (product.lhs, product.rhs)]
    if any(value.ndim or np.frexp(value)[0] != 0.5 for value in own):
        return None
    return replace(product, shape=tuple(shape))


def _product(graph: OnnxGraph, node: onnx.NodeProto, kind: str) -> _Product | None:
    """Return a MatMul of dequantized operands whose only reader is an operator of that kind with a constant."""
    behind = graph.only_user(node, kind) if node.op_type == "MatMul" else None
    if behind is None:
        return None
    lhs, rhs, constant = graph.maker(node, 0), graph.maker(node, 1), other_input(behind, node.output[0])
    if lhs is None or rhs is None or {lhs.op_type, rhs.op_type} != {"DequantizeLinear"}:
        return None
    return _Product(node, lhs, rhs, behind, constant) if constant in graph.constants else None


class _Writer:
    """Collects the nodes of the new graph, and adds the constants that they need to the model."""

    def __init__(self, model: onnx.ModelProto, graph: OnnxGraph) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph = graph
        self._constants = model.graph.initializer
        self._steps: set[str] = set()
        self._columns_of: dict[tuple[Any, ...], str] = {}
        self._products_of: Counter[str] = Counter()
        self._add_constant(STEP, np.array(1, np.int32))

    def write(self, product: _Product) -> None:
        """Write a product, and let the node behind it read the result; a number tells those of one operand apart."""
        node, lhs, rhs, behind = product.multiply, product.lhs, product.rhs, product.behind
        number = self._products_of[rhs.output[0]] or ""
        self._products_of[rhs.output[0]] += 1
        (output,), scales, right_scale = node.output, f"{rhs.output[0]}.scales{number}", rhs.input[1]
        codes, summed = f"{output}.codes", f"{output}.sum"
        step = self._step(lhs)
        if product.shape:
            right_scale = f"{scales}.heads"
            inputs = [self._columns(product), product.constant]
            self._add("Mul", inputs, right_scale, f"{_named(rhs, 'HeadScale')}{number}")
        self._add("Mul", [step, right_scale], scales, f"{_named(rhs, 'Mul')}{number}")
        operands = [lhs.input[0], rhs.input[0], lhs.input[2], rhs.input[2]]
        self._add("MatMulInteger", operands, codes, _named(node, "MatMulInteger"))
        self._add("Cast", [codes], summed, _named(node, "Cast"), to=TensorProto.FLOAT)
        if product.shape:
            behind.input[:] = [summed, scales]
        else:
            self._add("Mul", [summed, scales], output, _named(node, "Mul"))
            behind.input[:] = [output, product.constant]  # fused in this order alone

    def _step(self, dequantize: onnx.NodeProto) -> str:
        """Return the scale of a DequantizeLinear as something computed."""
        step = f"{dequantize.output[0]}.step"
        if step not in self._steps:
            self._steps.add(step)
            self._add("DequantizeLinear", [STEP, dequantize.input[1]], step, _named(dequantize, "Step"))
        return step

    def _columns(self, product: _Product) -> str:
        """Return the scale of the right operand for each column of each matrix; equal ones are one tensor."""
        rhs, (images, *heads, _, columns) = product.rhs, product.shape
        key = (self._graph.value(rhs.input[1]).tobytes(), images, *heads, columns)
        if key not in self._columns_of:
            step = self._step(rhs)
            expanded, shape = f"{step}.columns", f"{step}.columns.shape"
            if isinstance(images, int):
                self._add_constant(shape, np.array([images, *heads, 1, columns], np.int64))
            else:
                self._add_constant(f"{shape}.matrix", np.array([*heads, 1, columns], np.int64))
                self._add("Shape", [rhs.input[0]], f"{shape}.images", _named(rhs, "Shape"), start=0, end=1)
                parts = [f"{shape}.images", f"{shape}.matrix"]
                self._add("Concat", parts, shape, _named(rhs, "Concat"), axis=0)
            self._add("Expand", [step, shape], expanded, _named(rhs, "Expand"))
            self._columns_of[key] = expanded
        return self._columns_of[key]

    def _add(self, kind: str, inputs: list[str], output: str, name: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], name, **attributes))

    def _add_constant(self, name: str, value: NDArray[Any]) -> None:
        self._constants.append(numpy_helper.from_array(value, name))


def _named(node: onnx.NodeProto, operator: str, old: str = "") -> str:
    """Return the name of a node with another operator in its last part, or behind a name that has none there."""
    old = old or node.op_type
    base, slash, last = node.name.rpartition("/")
    return f"{base}{slash}{last.replace(old, operator, 1)}" if old in last else f"{node.name}/{operator}"
