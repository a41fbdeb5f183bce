"""What steps and readers ask of an onnx_ir model: who makes a value, who reads it, what a constant holds.

A value knows its maker (`producer()`) and its readers (`uses()`), and stays true while nodes come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq4vit_fx import names
from ptq4vit_fx.errors import failure

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
#: Operators that make codes of values and values of codes: input, scale, zero point.
PAIR = frozenset([QUANTIZE, DEQUANTIZE])
#: Standard operators that multiply matrices.
PRODUCTS = frozenset(["MatMul", "Gemm", "Conv"])
#: Operators that move values and change none.
MOVES = frozenset(["Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Split", "Identity"])

Array = NDArray[Any]


def name_of(named: ir.Node | ir.Value | None) -> str:
    """Return the name of a node or a value, "" if it has none."""
    return (named.name or "") if named is not None else ""


def scope_of(node: ir.Node) -> str:
    """Return the scope in a node's name: the site of a Q or DQ, with the range of a twin's branch; else its module."""
    return names.scope_of(name_of(node))


def maker(node: ir.Node | None, index: int, kind: str | None = None) -> ir.Node | None:
    """Return the node that computes an input, if it is of that operator, or of any.

    None for a constant, for the model's own input, and where there is no such input or no node to begin with.
    """
    value = node.inputs[index] if node is not None and index < len(node.inputs) else None
    found = None if value is None else value.producer()
    return found if found is not None and kind in (None, found.op_type) else None


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is an initializer."""
    return value is not None and value.is_initializer() and value.const_value is not None


def array(value: ir.Value | None) -> Array:
    """Return what a constant holds; raises KeyError with the name of a value that is computed."""
    if value is None or not is_constant(value):
        raise KeyError(name_of(value))
    assert value.const_value is not None
    return value.const_value.numpy()


def kind_of(value: ir.Value | None) -> ir.DataType | None:
    """Return the data type of a constant, None of any other value."""
    return value.const_value.dtype if value is not None and is_constant(value) and value.const_value else None


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the operator must have."""
    value = node.inputs[index]
    assert value is not None, node
    return value


def users(node: ir.Node) -> list[ir.Node]:
    """Return the nodes that read the first output, each once."""
    return list(dict.fromkeys(use.node for use in node.outputs[0].uses()))


def only_user(node: ir.Node | None, kind: str) -> ir.Node | None:
    """Return the one node that reads the first output, if it is of that operator and nobody else reads it."""
    found = [] if node is None or node.outputs[0].is_graph_output() else users(node)
    return found[0] if [user.op_type for user in found] == [kind] else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the input of an operator of two that is not `value`; None if there is none."""
    return next((found for found in node.inputs if found is not value), None)


def add_constant(model: ir.Model, name: str, values: Array | ir.TensorProtocol) -> ir.Value:
    """Return the initializer of that name; where there is none yet, one with these values is added.

    Raises PTQError if the name is that of other values: whoever reads them would compute something else.
    """
    if name not in model.graph.initializers:
        value = ir.Value(name=name)
        set_constant(value, values)
        model.graph.initializers.add(value)
    found = model.graph.initializers[name]
    if not _holds(found, values):
        got, do = "other values under that name", "report this as a bug"
        raise failure("export_onnx", f"constant {name}", expected="one meaning of every name", got=got, do=do)
    return found


def _holds(constant: ir.Value, values: Array | ir.TensorProtocol) -> bool:
    """Return whether a constant has exactly these values, in their type and shape."""
    if constant.const_value is values:
        return True
    mine, theirs = array(constant), values if isinstance(values, np.ndarray | np.generic) else values.numpy()
    return mine.dtype == theirs.dtype and np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f")


def set_constant(value: ir.Value, values: Array | ir.TensorProtocol) -> None:
    """Let an initializer hold other values; its type and shape follow."""
    tensor = ir.Tensor(values, name=value.name) if isinstance(values, np.ndarray | np.generic) else values
    value.const_value, value.type, value.shape = tensor, ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())


def new_node(kind: str, inputs: Sequence[ir.Value | None], output: str, name: str, **attributes: Any) -> ir.Node:
    """Return a node of the standard operators with one output of that name; a graph must take it in."""
    return ir.node(kind, inputs, attributes, outputs=[ir.Value(name=output)], name=name)


def take_over(node: ir.Node, old: ir.Value) -> None:
    """Let a node make what `old` was: its name, its type and shape, its readers and its place among the outputs."""
    new = node.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
