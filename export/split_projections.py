"""Split a projection that computes q, k and v at once into one for each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ptq4vit_fx.export.onnx_graph import OnnxGraph


@dataclass(frozen=True)
class _Projection:
    """MatMul, Add, Reshape to (..., parts, heads, dim), Transpose, and the parts: a Slice and a Squeeze for each."""

    product: onnx.NodeProto
    add: onnx.NodeProto
    reshape: onnx.NodeProto
    transpose: onnx.NodeProto
    slices: list[onnx.NodeProto]
    squeezes: list[onnx.NodeProto]
    dim: int

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        return [self.product, self.add, self.reshape, self.transpose, *self.slices, *self.squeezes]


def with_split_projections(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write every fused projection of q, k and v as one product for each; in place, return it.

    ONNX Runtime's Split copies the float result once more, on one thread; three products write three results. Whatever
    is not MatMul, Add, Reshape, Transpose and a Slice and Squeeze for each part stays as it is.
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
    read = {name for node in nodes for name in node.input}
    nodes = [node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in read]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)
    return model


def _projection(graph: OnnxGraph, product: onnx.NodeProto) -> _Projection | None:
    """Follow a product to the parts of its result; None if another operator or reader is on the way."""
    weight = graph.maker(product, 1) if product.op_type == "MatMul" else None
    if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in graph.constants:
        return None
    chain = [product]
    for expected in ("Add", "Reshape", "Transpose"):
        users = graph.users(chain[-1])
        if [user.op_type for user in users] != [expected] or chain[-1].output[0] in graph.outputs:
            return None
        chain.append(users[0])
    _, add, reshape, transpose = chain
    bias = next((name for name in add.input if name != product.output[0]), "")
    if bias not in graph.constants or reshape.input[1] not in graph.constants:
        return None
    order = list(helper.get_attribute_value(transpose.attribute[0]))
    parts = [node for node in graph.users(transpose) if all(name in graph.constants for name in node.input[1:])]
    parts.sort(key=lambda node: int(graph.value(node.input[1]).flat[0]))
    shape = graph.value(reshape.input[1])
    columns = graph.value(weight.input[0]).shape[1]
    dims = [dim for dim in range(len(shape)) if np.prod(shape[dim:]) == columns and (shape[dim:] > 0).all()]
    if not dims or graph.value(bias).shape[-1] != columns or transpose.output[0] in graph.outputs:
        return None
    dim, axis = dims[-1], order.index(dims[-1])
    squeezes = []
    for number, part in enumerate(parts):
        users = graph.users(part)
        if part.op_type != "Slice" or [user.op_type for user in users] != ["Squeeze"]:
            return None
        if [graph.value(name).tolist() for name in part.input[1:4]] != [[number], [number + 1], [axis]]:
            return None
        squeezes.append(users[0])
    if not len(parts) == len(graph.users(transpose)) == shape[dim]:
        return None
    return _Projection(product, add, reshape, transpose, parts, squeezes, dim)


def _split(model: onnx.ModelProto, graph: OnnxGraph, projection: _Projection) -> list[onnx.NodeProto]:
    """Return the nodes of each part; their weights, scales and biases are added to the model."""
    product, dim, count = projection.product, projection.dim, len(projection.slices)
    weight = graph.maker(product, 1)
    assert weight is not None
    bias = next(name for name in projection.add.input if name != product.output[0])
    shape = np.delete(graph.value(projection.reshape.input[1]), dim)
    order = list(helper.get_attribute_value(projection.transpose.attribute[0]))
    kept = [axis - (axis > dim) for axis in order if axis != dim]
    model.graph.initializer.append(numpy_helper.from_array(shape, f"{projection.reshape.name}.shape"))
    nodes = []
    for number, squeeze in enumerate(projection.squeezes):

        def part_of(name: str, number: int = number) -> str:
            """Store the columns of this part of a constant; return its name."""
            value = graph.value(name)
            if not value.ndim:
                return name
            stored = f"{name}_part{number}"
            if stored not in graph.constants:
                columns = np.split(value, count, axis=-1)[number]
                graph.constants[stored] = model.graph.initializer.add()
                graph.constants[stored].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(columns), stored))
            return stored

        def node(like: onnx.NodeProto, inputs: list[str], output: str = "", number: int = number) -> str:
            """Append a node like another one, under its name and a number; return its output."""
            output = output or f"{like.output[0]}_part{number}"
            made = helper.make_node(like.op_type, inputs, [output], name=f"{like.name}_part{number}")
            made.attribute.extend(like.attribute)
            nodes.append(made)
            return output

        dequantized = node(weight, [part_of(name) for name in weight.input])
        result = node(product, [product.input[0], dequantized])
        result = node(projection.add, [result, part_of(bias)])
        result = node(projection.reshape, [result, f"{projection.reshape.name}.shape"])
        node(projection.transpose, [result], squeeze.output[0])
        attribute = helper.make_attribute("perm", kept)
        del nodes[-1].attribute[:]
        nodes[-1].attribute.append(attribute)
    return nodes
