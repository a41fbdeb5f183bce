"""A good model whose inputs, nodes or tensors were changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hostile import EVIL, Case, changed


def takes(shape: Sequence[Any] | None, kind: int = TensorProto.FLOAT) -> Case:
    """Return the case of an input of that shape and type."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info(model.graph.input[0].name, kind, shape))

    return changed(change)


def each_node(change: Callable[[NodeProto], Any]) -> Case:
    """Return the case of a change to every node."""
    return changed(lambda model: [change(node) for node in model.graph.node])


def each_tensor(change: Callable[[TensorProto], Any]) -> Case:
    """Return the case of a change to every initializer."""
    return changed(lambda model: [change(tensor) for tensor in model.graph.initializer])


def setting(name: str, value: Any) -> Callable[[Any], None]:
    """Return a change that sets a field."""
    return lambda message: setattr(message, name, value)


def without(name: str) -> Callable[[Any], None]:
    """Return a change that clears a field."""
    return lambda message: message.ClearField(name)


def backwards(model: onnx.ModelProto) -> None:
    """Let every node stand in front of those whose results it reads."""
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def computed_scales(model: onnx.ModelProto) -> None:
    """Let every scale be computed, which is valid ONNX."""
    for node in list(model.graph.node):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            model.graph.node.insert(0, helper.make_node("Identity", [node.input[1]], [f"{node.name}_s"]))
            node.input[1] = f"{node.name}_s"


def scales_of(*dims: int) -> Case:
    """Return the case of scales of another shape."""

    def change(tensor: TensorProto) -> None:
        if tensor.name.endswith(".scale"):
            tensor.CopyFrom(numpy_helper.from_array(np.ones(dims, np.float32), tensor.name))

    return each_tensor(change)


CHANGES: dict[str, Case] = {
    "batch of 1e9": takes((10**9, 3, 16, 16)),
    "batch of 2^62": takes((2**62, 3, 16, 16)),
    "batch of 0": takes((0, 3, 16, 16)),
    "batch of -1": takes((-1, 3, 16, 16)),
    "batch of 2": takes((2, 3, 16, 16)),
    "images of 1e6 x 1e6": takes(("n", 3, 10**6, 10**6)),
    "images of 32": takes(("n", 3, 32, 32)),
    "no shape": takes(None),
    "three dimensions": takes(("n", 3, 16)),
    "images of any size": takes(("n", "c", "h", "w")),
    "images of any height": takes(("n", 3, "h", 16)),
    "float16 images": takes(("n", 3, 16, 16), TensorProto.FLOAT16),
    "uint8 images": takes(("n", 3, 16, 16), TensorProto.UINT8),
    "text in place of images": takes(("n", 3, 16, 16), TensorProto.STRING),
    "images of type 99": takes(("n", 3, 16, 16), 99),
    "backwards": changed(backwards),
    "opset 99": changed(lambda model: setting("version", 99)(model.opset_import[0])),
    "opset 1": changed(lambda model: setting("version", 1)(model.opset_import[0])),
    "opset -1": changed(lambda model: setting("version", -1)(model.opset_import[0])),
    "no opset": changed(without("opset_import")),
    "IR version 99": changed(setting("ir_version", 99)),
    "no IR version": changed(without("ir_version")),
    "no graph": changed(without("graph")),
    "no nodes": changed(lambda model: without("node")(model.graph)),
    "no initializers": changed(lambda model: without("initializer")(model.graph)),
    "no inputs": changed(lambda model: without("input")(model.graph)),
    "no outputs": changed(lambda model: without("output")(model.graph)),
    "an output of nothing": changed(lambda model: setting("name", "nothing")(model.graph.output[0])),
    "an input twice": changed(lambda model: model.graph.input.append(model.graph.input[0])),
    "an initializer twice": changed(lambda model: model.graph.initializer.append(model.graph.initializer[0])),
    "a node twice": changed(lambda model: model.graph.node.append(model.graph.node[0])),
    "computed scales": changed(computed_scales),
    "nodes without inputs": each_node(without("input")),
    "nodes without outputs": each_node(without("output")),
    "nodes without names": each_node(without("name")),
    "nodes of one name": each_node(setting("name", "a:lhs/QuantizeLinear")),
    "names that a terminal obeys": each_node(lambda node: setting("name", f"{node.name}{EVIL}")(node)),
    "names of 10 kB": each_node(lambda node: setting("name", f"{node.name}/{'a' * 10**4}")(node)),
    "no attributes": each_node(without("attribute")),
    "unknown operators": each_node(setting("op_type", f"Foo{EVIL}")),
    "an unknown domain": each_node(setting("domain", "evil.corp")),
    "scales of two dimensions": scales_of(1, 1),
    "scales of seven": scales_of(7),
    "scales of none": scales_of(0),
    "tensors of 1e12": each_tensor(lambda tensor: tensor.dims.insert(0, 10**12)),
    "tensors of 2^124": each_tensor(lambda tensor: tensor.dims.extend([2**62, 2**62])),
    "negative tensors": each_tensor(lambda tensor: tensor.dims.insert(0, -1)),
    "empty tensors": each_tensor(without("raw_data")),
    "tensors of type 99": each_tensor(setting("data_type", 99)),
    "tensors of text": each_tensor(setting("data_type", TensorProto.STRING)),
    "tensors of 4 bits": each_tensor(setting("data_type", TensorProto.INT4)),
    "tensors without names": each_tensor(without("name")),
}
