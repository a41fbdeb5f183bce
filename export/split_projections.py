"""Split a projection that computes q, k and v at once into one for each."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ptq4vit_fx.export.onnx_graph import OnnxGraph, other_input, replace_nodes

#: Behind the name of what belongs to one part: _part0 is the first.
PART = "_part"


@dataclass(frozen=True)
class _Projection:
    """MatMul, Add, Reshape to (..., parts, heads, dim), Transpose, and for each part the nodes that take it.

    add: None without bias. dim: of the parts, in the shape that Reshape gives.
    """

    product: onnx.NodeProto
    add: onnx.NodeProto | None
    reshape: onnx.NodeProto
    transpose: onnx.NodeProto
    parts: list[list[onnx.NodeProto]]
    dim: int

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        add = [] if self.add is None else [self.add]
        return [self.product, *add, self.reshape, self.transpose, *chain.from_iterable(self.parts)]


def with_split_projections(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write every fused projection of q, k and v as one product for each; in place, return it.

    ONNX Runtime's Split copies the float result once more, on one thread; three products write three results. Whatever
    is not MatMul, Add, Reshape, Transpose and one part after the other, each read once, stays as it is.
    """
    graph = OnnxGraph(model)
    found = [projection for node in graph.nodes if (projection := _projection(graph, node)) is not None]
    replaced = {id(node) for projection in found for node in projection.nodes}
    firsts = {id(projection.transpose): projection for projection in found}
    nodes = []
    for node in graph.nodes:
        if id(node) in firsts:
            nodes += _split(model, graph, firsts[id(node)])
        elif id(node) not in replaced:
            nodes.append(node)
    replace_nodes(model, nodes)
    return model


def _projection(graph: OnnxGraph, product: onnx.NodeProto) -> _Projection | None:
    """Follow a product to the parts of its result; None if another operator or reader is on the way."""
    weight = graph.maker(product, 1) if product.op_type == "MatMul" else None
    if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in graph.constants:
        return None
    add = graph.only_user(product, "Add")
    reshape = graph.only_user(add or product, "Reshape")
    transpose = graph.only_user(reshape, "Transpose") if reshape is not None else None
    if reshape is None or transpose is None or transpose.output[0] in graph.outputs:
        return None
    if reshape.input[1] not in graph.constants or (
        add is not None and other_input(add, product.output[0]) not in graph.constants
    ):
        return None
    shape, columns = graph.value(reshape.input[1]), graph.value(weight.input[0]).shape[1]
    dims = [dim for dim in range(len(shape)) if np.prod(shape[dim:]) == columns and (shape[dim:] > 0).all()]
    if not dims or (add is not None and graph.value(other_input(add, product.output[0])).shape[-1:] != (columns,)):
        return None
    axis = helper.get_attribute_value(transpose.attribute[0]).index(dims[-1])
    takers = [_part(graph, node, axis) for node in graph.users(transpose)]
    if sorted(number for number, _ in takers) != list(range(shape[dims[-1]])):
        return None
    parts = [nodes for _, nodes in sorted(takers, key=operator.itemgetter(0))]
    return _Projection(product, add, reshape, transpose, parts, dims[-1])


def _part(graph: OnnxGraph, node: onnx.NodeProto, axis: int) -> tuple[int, list[onnx.NodeProto]]:
    """Return which part along `axis` a node takes, and the nodes that take it: Gather, or Slice and Squeeze."""
    constants = [graph.value(name).reshape(-1).tolist() for name in node.input[1:] if name in graph.constants]
    if node.op_type == "Gather" and constants and not graph.value(node.input[1]).ndim:
        along = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        return (constants[0][0], [node]) if along == axis else (-1, [])
    squeeze = graph.only_user(node, "Squeeze")
    if node.op_type == "Slice" and squeeze is not None and len(constants) >= 3:
        starts, stops, axes = constants[:3]
        alone = axes == [axis] and stops == [starts[0] + 1]
        return (starts[0], [node, squeeze]) if alone else (-1, [])
    return -1, []


def _split(model: onnx.ModelProto, graph: OnnxGraph, projection: _Projection) -> list[onnx.NodeProto]:
    """Return the nodes of each part; their weights, scales and biases are added to the model."""
    product, dim, count = projection.product, projection.dim, len(projection.parts)
    weight = graph.maker(product, 1)
    assert weight is not None
    shape = np.delete(graph.value(projection.reshape.input[1]), dim)
    order = list(helper.get_attribute_value(projection.transpose.attribute[0]))
    kept = [axis - (axis > dim) for axis in order if axis != dim]
    model.graph.initializer.append(numpy_helper.from_array(shape, f"{projection.reshape.name}.shape"))
    nodes = []
    for number, taken in enumerate(projection.parts):

        def part_of(name: str, number: int = number) -> str:
            """Store the columns of this part of a constant; return its name."""
            value = graph.value(name)
            if not value.ndim:
                return name
            stored = f"{name}{PART}{number}"
            if stored not in graph.constants:
                columns = np.split(value, count, axis=-1)[number]
                graph.constants[stored] = model.graph.initializer.add()
                graph.constants[stored].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(columns), stored))
            return stored

        def node(like: onnx.NodeProto, inputs: list[str], output: str = "", number: int = number) -> str:
            """Append a node like another one, under its name and a number; return its output."""
            output = output or f"{like.output[0]}{PART}{number}"
            made = helper.make_node(like.op_type, inputs, [output], name=f"{like.name}{PART}{number}")
            made.attribute.extend(like.attribute)
            nodes.append(made)
            return output

        dequantized = node(weight, [part_of(name) for name in weight.input])
        result = node(product, [product.input[0], dequantized])
        if projection.add is not None:
            result = node(projection.add, [result, part_of(other_input(projection.add, product.output[0]))])
        result = node(projection.reshape, [result, f"{projection.reshape.name}.shape"])
        node(projection.transpose, [result], taken[-1].output[0])
        attribute = helper.make_attribute("perm", kept)
        del nodes[-1].attribute[:]
        nodes[-1].attribute.append(attribute)
    return nodes
