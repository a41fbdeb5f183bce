"""Who makes and who reads each tensor of an ONNX model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

#: Standard operators that multiply matrices.
PRODUCTS = frozenset(["MatMul", "Gemm", "Conv"])
#: Operators that move values and change none.
MOVES = frozenset(["Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Split", "Identity"])


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove, in place, the initializers that no node reads, and recorded types of tensors that no node makes."""
    read = {name for node in model.graph.node for name in node.input}
    made = {name for node in model.graph.node for name in node.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    types = [value for value in model.graph.value_info if value.name in made]
    del model.graph.initializer[:], model.graph.value_info[:]
    model.graph.initializer.extend(kept)
    model.graph.value_info.extend(types)


def replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Make these the nodes of a model, in place, without dequantizations that nobody reads and what they alone used."""
    read = {name for node in nodes for name in node.input} | {output.name for output in model.graph.output}
    kept = [node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in read]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    drop_unused(model)


def other_input(node: onnx.NodeProto, name: str) -> str:
    """Return the input of an operator of two that is not `name`; empty if there is none."""
    return next((found for found in node.input if found != name), "")


class OnnxGraph:
    """An index of a model, for reading; edits of the model make it stale."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)

    def maker(self, node: onnx.NodeProto, index: int) -> onnx.NodeProto | None:
        """Return the node that computes an input; None for constants and the model's own inputs."""
        return self.makers.get(node.input[index])

    def value(self, name: str) -> NDArray[Any]:
        """Return a constant's value; KeyError if it is computed."""
        return numpy_helper.to_array(self.constants[name])

    def users(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that read the first output."""
        return self.readers[node.output[0]]

    def only_user(self, node: onnx.NodeProto, kind: str) -> onnx.NodeProto | None:
        """Return the one node that reads the first output, if it is of that operator and nobody else reads it."""
        users = self.users(node)
        alone = [user.op_type for user in users] == [kind] and node.output[0] not in self.outputs
        return users[0] if alone else None
