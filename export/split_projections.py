"""Split a projection that computes q, k and v at once into one for each."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.contract import rewrite
from ptq4vit_fx.export.nodes import DEQUANTIZE


@dataclass(frozen=True)
class _Projection:
    """MatMul, Add, Reshape to (..., parts, heads, dim), Transpose, and for each part the nodes that take it.

    add: None without bias. dim: of the parts, in the shape that Reshape gives.
    """

    product: ir.Node
    weight: ir.Node
    add: ir.Node | None
    bias: ir.Value | None
    reshape: ir.Node
    transpose: ir.Node
    parts: list[list[ir.Node]]
    dim: int


@rewrite(nothing="no projection is read part by part, or the file is for one image: one product is faster then")
def split_projections(model: ir.Model) -> int:
    """Write every fused projection of q, k and v as one product for each, in place.

    ONNX Runtime's Split copies the float result once more, on one thread; three products write three results. Whatever
    is not MatMul, Add, Reshape, Transpose and one part after the other, each read once, stays as it is. For one image
    alone a split costs less than two more products.
    """
    shape = model.graph.inputs[0].shape
    if shape is not None and shape[0] == 1:
        return 0
    found = [projection for node in model.graph if (projection := _projection(node)) is not None]
    for projection in found:
        _split(model, projection)
    return len(found)


def _projection(product: ir.Node) -> _Projection | None:
    """Follow a product to the parts of its result; None if another operator or reader is on the way."""
    weight = nodes.maker(product, 1, DEQUANTIZE) if product.op_type == "MatMul" else None
    if weight is None or not nodes.is_constant(weight.inputs[0]):
        return None
    add = nodes.only_user(product, "Add")
    bias = None if add is None else nodes.other_input(add, product.outputs[0])
    reshape = nodes.only_user(add or product, "Reshape")
    transpose = nodes.only_user(reshape, "Transpose")
    if reshape is None or transpose is None or transpose.outputs[0].is_graph_output():
        return None
    if not nodes.is_constant(reshape.inputs[1]) or (add is not None and not nodes.is_constant(bias)):
        return None
    shape, columns = nodes.array(reshape.inputs[1]), nodes.array(weight.inputs[0]).shape[1]
    dims = [dim for dim in range(len(shape)) if np.prod(shape[dim:]) == columns and (shape[dim:] > 0).all()]
    if not dims or (add is not None and nodes.array(bias).shape[-1:] != (columns,)):
        return None
    axis = transpose.attributes["perm"].as_ints().index(dims[-1])
    takers = [_part(node, axis) for node in nodes.users(transpose)]
    if sorted(number for number, _ in takers) != list(range(shape[dims[-1]])):
        return None
    parts = [taken for _, taken in sorted(takers, key=operator.itemgetter(0))]
    return _Projection(product, weight, add, bias, reshape, transpose, parts, dims[-1])


def _part(node: ir.Node, axis: int) -> tuple[int, list[ir.Node]]:
    """Return which part along `axis` a node takes, and the nodes that take it: Gather, or Slice and Squeeze."""
    constants = [nodes.array(value).reshape(-1).tolist() for value in node.inputs[1:] if nodes.is_constant(value)]
    if node.op_type == "Gather" and constants and not nodes.array(node.inputs[1]).ndim:
        return (constants[0][0], [node]) if node.attributes.get_int("axis", 0) == axis else (-1, [])
    squeeze = nodes.only_user(node, "Squeeze")
    if node.op_type == "Slice" and squeeze is not None and len(constants) >= 3:
        starts, stops, axes = constants[:3]
        alone = axes == [axis] and stops == [starts[0] + 1]
        return (starts[0], [node, squeeze]) if alone else (-1, [])
    return -1, []


def _split(model: ir.Model, projection: _Projection) -> None:
    """Write the nodes of each part; their weights, scales and biases are added to the model."""
    product, add, dim = projection.product, projection.add, projection.dim
    reshape, transpose = projection.reshape, projection.transpose
    sizes = np.delete(nodes.array(reshape.inputs[1]), dim)
    shape = nodes.add_constant(model, names.tensor(nodes.name_of(reshape), "shape"), sizes)
    kept = [axis - (axis > dim) for axis in transpose.attributes["perm"].as_ints() if axis != dim]
    for number, taken in enumerate(projection.parts):
        part = _Part(model, transpose, number, len(projection.parts))
        dequantized = part.write(projection.weight, [part.columns(value) for value in projection.weight.inputs])
        result = part.write(product, [product.inputs[0], dequantized])
        if add is not None:
            result = part.write(add, [result, part.columns(projection.bias)])
        last = part.write(transpose, [part.write(reshape, [result, shape])], perm=kept).producer()
        assert last is not None
        nodes.take_over(last, taken[-1].outputs[0])
    old = [product, reshape, transpose, *chain.from_iterable(projection.parts)]
    model.graph.remove([*old, *([] if add is None else [add])], safe=True)


@dataclass(frozen=True)
class _Part:
    """One of `count` equal parts of a projection; its nodes are written in front of `place`."""

    model: ir.Model
    place: ir.Node
    number: int
    count: int

    def columns(self, value: ir.Value | None) -> ir.Value | None:
        """Return the columns of this part of a constant, which are stored; one number stands for all columns."""
        values = nodes.array(value)
        if not values.ndim:
            return value
        columns = np.ascontiguousarray(np.split(values, self.count, axis=-1)[self.number])
        return nodes.add_constant(self.model, names.part(nodes.name_of(value), self.number), columns)

    def write(self, like: ir.Node, inputs: list[ir.Value | None], **attributes: list[int]) -> ir.Value:
        """Write a node like another one, under its name and a number; return its result."""
        output = names.part(nodes.name_of(like.outputs[0]), self.number)
        known = {**like.attributes, **attributes}
        node = nodes.new_node(like.op_type, inputs, output, names.part(nodes.name_of(like), self.number), **known)
        self.place.prepend(node)
        return node.outputs[0]
