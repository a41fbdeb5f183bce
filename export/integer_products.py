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

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.contract import rewrite
from ptq4vit_fx.export.nodes import DEQUANTIZE, QUANTIZE

#: The constant 1, in codes: dequantized it is the scale.
STEP = "one_step"
CODES = (ir.DataType.INT8, ir.DataType.UINT8)


@rewrite(nothing="no product of codes has a bias or scales per head behind it that go into it")
def to_integer_products(model: ir.Model) -> int:
    """Write as MatMulInteger, in place, what the runtime then fuses with the node behind it.

    These are products of an activation and a weight with a bias behind them, and of two activations with scales per
    head. Others have nothing to gain. Names: MatMul, and the nodes beside it, carry the same names with another
    operator in them.
    """
    both = (_biased_product(node) or _product_per_head(node) for node in model.graph)
    found = [product for product in both if product is not None]
    writer = _Writer(model)
    for product in found:
        writer.write(product)
    return len(found)


@rewrite(nothing="no product has the form that to_integer_products writes")
def to_qdq_products(model: ir.Model) -> int:
    """Write DequantizeLinear, DequantizeLinear -> MatMul, in place, where `to_integer_products` wrote integers.

    Right operands that had equal scales have one constant for them then.
    """
    products = list(integer_products(model))
    made = {nodes.name_of(n.outputs[0]): n.outputs[0] for n in model.graph if n.op_type == DEQUANTIZE}
    for product in products:
        _dequantize(product, made)
    return len(products)


def in_qdq_form(model: ir.Model) -> ir.Model:
    """Return a copy with the products of `to_qdq_products`, for reading."""
    copy = model.clone()
    to_qdq_products(copy)
    return copy


@dataclass(frozen=True)
class IntegerProduct:
    """The nodes that one product became: MatMulInteger, Mul by the scales behind its Cast, and what computes these.

    heads: the Mul by scales per head; None if the right operand is a weight, whose scales are a constant. Products
    share some of its nodes.
    """

    multiply: ir.Node
    scaled: ir.Node
    scales: ir.Node
    step: ir.Node
    heads: ir.Node | None

    @property
    def result(self) -> str:
        """The name of the product's own result, of which the codes, the sum and the rest are named."""
        return names.owner_of(nodes.name_of(self.multiply.outputs[0]))

    @property
    def right_scale(self) -> ir.Value:
        """The constant scale of the right operand; with scales per head, of the step that is expanded to the heads."""
        return nodes.input_of(nodes.maker(nodes.maker(self.heads, 0), 0) or self.scales, 1)


def integer_products(model: ir.Model) -> Iterator[IntegerProduct]:
    """Yield what `to_integer_products` wrote in a model; another MatMulInteger has another form."""
    for scaled in model.graph:
        cast, scales = nodes.maker(scaled, 0, "Cast"), nodes.maker(scaled, 1, "Mul")
        multiply, step = nodes.maker(cast, 0), nodes.maker(scales, 0, DEQUANTIZE)
        if scaled.op_type != "Mul" or multiply is None or scales is None or step is None:
            continue
        if nodes.name_of(step.inputs[0]) == STEP:
            yield IntegerProduct(multiply, scaled, scales, step, nodes.maker(scales, 1))


def _dequantize(product: IntegerProduct, made: dict[str, ir.Value]) -> None:
    """Write one product as DequantizeLinear, DequantizeLinear -> MatMul. made: name -> what is dequantized already."""
    scaled, operands = product.scaled, []
    codes, right_codes, *zero_points = product.multiply.inputs
    for node, operator, inputs, axis in (
        (product.step, "Step", [codes, product.step.inputs[1], zero_points[0]], None),
        # An axis is of no meaning for one scale.
        (product.scales, "Mul", [right_codes, product.right_scale, zero_points[1]], None if product.heads else 1),
    ):
        value, name = names.owner_of(nodes.name_of(node.outputs[0])), nodes.name_of(node)
        if value not in made:
            again = nodes.new_node(DEQUANTIZE, inputs, value, names.beside(name, operator, DEQUANTIZE), axis=axis)
            scaled.prepend(again)
            made[value] = again.outputs[0]
        operands.append(made[value])
    name = names.beside(nodes.name_of(product.multiply), "MatMulInteger", "MatMul")
    multiply = nodes.new_node("MatMul", operands, product.result, name)
    scaled.prepend(multiply)
    if product.heads is None:
        nodes.take_over(multiply, scaled.outputs[0])
    else:
        scaled.replace_input_with(0, multiply.outputs[0])
        scaled.replace_input_with(1, product.heads.inputs[1])


@dataclass(frozen=True)
class _Product:
    """A MatMul, the DequantizeLinear of either operand, the node behind it, and the constant that this reads.

    behind: an Add of a bias, or a Mul by a scale per head; then `shape` is that of the right operand, the first of it a
    name if the number of images is not known.
    """

    multiply: ir.Node
    lhs: ir.Node
    rhs: ir.Node
    behind: ir.Node
    constant: ir.Value
    shape: tuple[int | str, ...] = ()


def _biased_product(node: ir.Node) -> _Product | None:
    """Return the product of a weight that a node is, or None if it is none that the runtime would fuse with a bias."""
    product = _product(node, "Add")
    weight = None if product is None else product.rhs.inputs[0]
    if product is None or nodes.kind_of(weight) not in CODES or nodes.array(weight).ndim != 2:
        return None
    return product if nodes.array(product.constant).shape == nodes.array(weight).shape[1:] else None


def _product_per_head(node: ir.Node) -> _Product | None:
    """Return the product of two activations that a node is, or None if its scales per head cannot go into it.

    They can if one number stands for a whole matrix, if the quantizers' own scales are powers of two, so that another
    order of the multiplications changes no bit, and if the shape of the right operand is known up to the images.
    """
    product = _product(node, "Mul")
    quantize = None if product is None else nodes.maker(product.rhs, 0, QUANTIZE)
    if product is None or quantize is None:
        return None
    recorded = nodes.input_of(quantize, 0).shape
    if recorded is None or nodes.maker(quantize, 0) is None:
        return None
    shape = [size if isinstance(size, int) else size.value for size in recorded]
    known = len(shape) > 2 and shape[0] and all(isinstance(size, int) and size for size in shape[1:])
    dims = list(nodes.array(product.constant).shape)
    scale = [1] * (len(shape) - len(dims)) + dims
    if not known or len(scale) > len(shape) or [scale[0], *scale[-2:]] != [1, 1, 1]:
        return None
    if any(count not in (1, size) for count, size in zip(scale, shape, strict=True)):
        return None
    own = [nodes.array(dequantize.inputs[1]) for dequantize in (product.lhs, product.rhs)]
    if any(value.ndim or np.frexp(value)[0] != 0.5 for value in own):
        return None
    return replace(product, shape=tuple(size for size in shape if size is not None))


def _product(node: ir.Node, kind: str) -> _Product | None:
    """Return a MatMul of dequantized operands whose only reader is an operator of that kind with a constant."""
    behind = nodes.only_user(node, kind) if node.op_type == "MatMul" else None
    if behind is None:
        return None
    lhs, rhs = (nodes.maker(node, index, DEQUANTIZE) for index in (0, 1))
    constant = nodes.other_input(behind, node.outputs[0])
    if lhs is None or rhs is None or constant is None or not nodes.is_constant(constant):
        return None
    return _Product(node, lhs, rhs, behind, constant)


class _Writer:
    """Writes products in front of those that they replace, and shares what several of them read."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._place: ir.Node  # in front of which nodes are written
        self._steps: dict[str, ir.Value] = {}
        self._columns_of: dict[tuple[Any, ...], ir.Value] = {}
        self._products_of: Counter[ir.Value] = Counter()
        self._taken = {nodes.name_of(node) for node in model.graph}  # a module may multiply behind its own product

    def write(self, product: _Product) -> None:
        """Write a product, and let the node behind it read the result; a number tells those of one operand apart."""
        node, lhs, rhs, behind = product.multiply, product.lhs, product.rhs, product.behind
        self._place, output = node, nodes.name_of(node.outputs[0])
        number = self._products_of[rhs.outputs[0]]
        self._products_of[rhs.outputs[0]] += 1
        scales = names.tensor(nodes.name_of(rhs.outputs[0]), "scales", number)
        step, right_scale = self._step(lhs), nodes.input_of(rhs, 1)
        if product.shape:
            inputs, name = [self._columns(product), product.constant], _beside(rhs, "HeadScale")
            right_scale = self._add("Mul", inputs, names.tensor(scales, "heads"), f"{name}{number or ''}")
        scale = self._add("Mul", [step, right_scale], scales, f"{_beside(rhs, 'Mul')}{number or ''}")
        operands = [nodes.input_of(lhs, 0), nodes.input_of(rhs, 0), nodes.input_of(lhs, 2), nodes.input_of(rhs, 2)]
        codes = self._add("MatMulInteger", operands, names.tensor(output, "codes"), _beside(node, "MatMulInteger"))
        cast, to = _beside(node, "Cast"), int(ir.DataType.FLOAT)
        summed = self._add("Cast", [codes], names.tensor(output, "sum"), cast, to=to)
        first, second = summed, scale
        if not product.shape:
            scaled = self._add("Mul", [summed, scale], output, _beside(node, "Mul"))
            scaled.type, scaled.shape = node.outputs[0].type, node.outputs[0].shape
            first, second = scaled, product.constant  # fused in this order alone
        behind.replace_input_with(0, first)
        behind.replace_input_with(1, second)
        self._model.graph.remove(node, safe=True)

    def _step(self, dequantize: ir.Node) -> ir.Value:
        """Return the scale of a DequantizeLinear as something computed."""
        name = names.tensor(nodes.name_of(dequantize.outputs[0]), "step")
        if name not in self._steps:
            inputs = [nodes.add_constant(self._model, STEP, np.array(1, np.int32)), nodes.input_of(dequantize, 1)]
            self._steps[name] = self._add(DEQUANTIZE, inputs, name, _beside(dequantize, "Step"))
        return self._steps[name]

    def _columns(self, product: _Product) -> ir.Value:
        """Return the scale of the right operand for each column of each matrix; equal ones are one tensor."""
        rhs, (images, *heads, _, columns) = product.rhs, product.shape
        key = (nodes.array(rhs.inputs[1]).tobytes(), images, *heads, columns)
        if key not in self._columns_of:
            step = self._step(rhs)
            expanded = names.tensor(nodes.name_of(step), "columns")
            sizes, shape = [*heads, 1, columns], names.tensor(expanded, "shape")
            if isinstance(images, int):
                wanted = nodes.add_constant(self._model, shape, np.array([images, *sizes], np.int64))
            else:
                matrix = nodes.add_constant(self._model, names.tensor(shape, "matrix"), np.array(sizes, np.int64))
                name = names.tensor(shape, "images")
                count = self._add("Shape", [nodes.input_of(rhs, 0)], name, _beside(rhs, "Shape"), start=0, end=1)
                wanted = self._add("Concat", [count, matrix], shape, _beside(rhs, "Concat"), axis=0)
            self._columns_of[key] = self._add("Expand", [step, wanted], expanded, _beside(rhs, "Expand"))
        return self._columns_of[key]

    def _add(self, kind: str, inputs: list[ir.Value], output: str, name: str, **attributes: Any) -> ir.Value:
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        free = next(n for n in itertools.chain([name], numbered) if n not in self._taken)
        self._taken.add(free)
        node = nodes.new_node(kind, list(inputs), output, free, **attributes)
        self._place.prepend(node)
        return node.outputs[0]


def _beside(node: ir.Node, operator: str) -> str:
    return names.beside(nodes.name_of(node), node.op_type, operator)
