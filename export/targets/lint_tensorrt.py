"""A linter for what TensorRT publishes about QDQ models; there is no TensorRT on this machine to ask.

Sources, named at each rule:
[types]     https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
[explicit]  https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html
[attention] https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html
[mha]       the developer guide's section "MHA fusion", as quoted in https://github.com/NVIDIA/TensorRT/issues/2981
[parser]    https://github.com/onnx/onnx-tensorrt, onnxOpImporters.cpp, QuantDequantLinearHelper
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.nodes import DEQUANTIZE, MOVES, PAIR, PRODUCTS, QUANTIZE

WITHOUT_TWINS = "quantize with recipes.tensorrt(), which has no softmax twin"
SEVEN_BITS = "give this product QConfig(activation=Uniform(7), ...): unsigned codes 0 .. 127 fit int8"
EIGHT_BITS = "quantize activations to 8 bits, as recipes.tensorrt() does: fewer need a Clip"
PER_TENSOR = "quantize attention per tensor, with recipes.tensorrt() or QConfig(matmul=Uniform(8))"


@dataclass(frozen=True)
class Violation:
    """A node that breaks a rule. rule: its name in RULES. got: what is there. do: what to change."""

    node: str
    rule: str
    got: str
    do: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}: {self.got}; {self.do}"


def lint_tensorrt(model: ir.Model | onnx.ModelProto) -> list[Violation]:
    """Return every violation of TensorRT's published rules for explicit int8 quantization, rule by rule.

    model: as `onnx.load` or `onnx_ir.load` read it.
    """
    graph = (ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model).graph
    return [violation for rule in RULES.values() for violation in rule(graph)]


def _pairs(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in PAIR)


def _int8(graph: ir.Graph) -> Iterator[Violation]:
    """Quantized values are signed INT8 [types]; uint8 is refused by the parser."""
    for node in _pairs(graph):
        kind = (nodes.kind_of(node.inputs[2]) if len(node.inputs) > 2 else None) or ir.DataType.UINT8
        if kind != ir.DataType.INT8:
            do = WITHOUT_TWINS if names.range_of(nodes.scope_of(node)) else SEVEN_BITS
            yield Violation(nodes.name_of(node), "int8", f"{kind.name} codes", do)


def _zero_point(graph: ir.Graph) -> Iterator[Violation]:
    """Quantization is symmetric: the zero point is written out and all zeros [types] [parser]."""
    for node in _pairs(graph):
        if len(node.inputs) < 3:
            yield Violation(nodes.name_of(node), "zero point", "none", "write a zero point of 0")
        elif np.any(value := nodes.array(node.inputs[2])):
            yield Violation(nodes.name_of(node), "zero point", f"zero point {value.reshape(-1)[0]}", WITHOUT_TWINS)


def _scale(graph: ir.Graph) -> Iterator[Violation]:
    """Scales are positive [parser]."""
    for node in _pairs(graph):
        if np.any(nodes.array(node.inputs[1]).astype(np.float64) <= 0):
            yield Violation(nodes.name_of(node), "positive scale", "a scale of 0 or less", "calibrate again")


def _per_tensor(graph: ir.Graph) -> Iterator[Violation]:
    """Activations have one scale [types] [parser]: per-axis quantization is for weights."""
    for node in _pairs(graph):
        count = nodes.array(node.inputs[1]).size
        if not nodes.is_constant(node.inputs[0]) and count > 1:
            yield Violation(nodes.name_of(node), "per-tensor activations", f"{count} scales", PER_TENSOR)


def _weight_axis(graph: ir.Graph) -> Iterator[Violation]:
    """Scales of a weight lie along its output channels [parser]: the last axis of a MatMul's, the first of a Conv's."""
    for node in _pairs(graph):
        shape = nodes.array(node.inputs[0]).shape if nodes.is_constant(node.inputs[0]) else ()
        if not shape or nodes.array(node.inputs[1]).size == 1:
            continue
        axis = node.attributes.get_int("axis", 1) % len(shape)
        for product in nodes.users(node):
            transposed = product.attributes.get_int("transB", 0)
            wanted = 0 if product.op_type == "Conv" or transposed else len(shape) - 1
            if product.op_type in PRODUCTS and axis != wanted:
                do = "quantize with weights='channel'"
                yield Violation(nodes.name_of(node), "output-channel axis", f"axis {axis}, not {wanted}", do)


def _pair(graph: ir.Graph) -> Iterator[Violation]:
    """A quantized activation is dequantized with the same scale, and by nothing else [explicit]."""
    for node in _pairs(graph):
        if node.op_type != QUANTIZE:
            continue
        for user in nodes.users(node):
            scale = nodes.array(user.inputs[1]) if user.op_type == DEQUANTIZE else None
            if scale is None or not np.array_equal(scale, nodes.array(node.inputs[1])):
                do = "dequantize it with the scale that quantized it"
                yield Violation(nodes.name_of(node), "Q/DQ pair", f"read by {user.op_type} {user.name}", do)


def _both_operands(graph: ir.Graph) -> Iterator[Violation]:
    """A quantized product has all its operands quantized, else it runs in float [explicit, placement of Q/DQ]."""
    for node in graph:
        made = [nodes.maker(node, index, DEQUANTIZE) for index in (0, 1)] if node.op_type in PRODUCTS else []
        if any(made) and not all(made):
            side = ("first", "second")[made.index(None)]
            do = "quantize both operands or leave both float (QConfigMapping.set_module_name(name, None))"
            yield Violation(nodes.name_of(node), "both operands", f"the {side} operand is float", do)


def _next_to_product(graph: ir.Graph) -> Iterator[Violation]:
    """DequantizeLinear feeds the product itself: scaling and Transpose belong in front of Q [explicit] [mha]."""
    for node in graph:
        if node.op_type != DEQUANTIZE:
            continue
        for user in nodes.users(node):
            if user.op_type not in PRODUCTS:
                do, got = f"move {user.op_type} in front of QuantizeLinear", f"read by {user.op_type} {user.name}"
                yield Violation(nodes.name_of(node), "DQ next to its product", got, do)


def _attention_scale(graph: ir.Graph) -> Iterator[Violation]:
    """The scale multiplies q or k in front of the first product, nothing but a mask lies behind it [attention]."""
    for softmax, first, between in _attentions(graph):
        for node in between if _is_quantized(first) else ():
            if node.op_type in ("Mul", "Div"):
                got = f"{node.op_type} between {first.name} and {softmax.name}"
                yield Violation(nodes.name_of(node), "attention scale in front of Q", got, PER_TENSOR)


def _softmax(graph: ir.Graph) -> Iterator[Violation]:
    """Q/DQ stand right behind softmax, once, if the products are quantized [mha]: a twin's branches break fusion."""
    for softmax, first, _ in _attentions(graph):
        kinds = [user.op_type for user in nodes.users(softmax)]
        if _is_quantized(first) and kinds != [QUANTIZE]:
            do = EIGHT_BITS if kinds == ["Clip"] else WITHOUT_TWINS
            yield Violation(nodes.name_of(softmax), "one Q behind softmax", f"read by {', '.join(kinds)}", do)


def _behind_second(graph: ir.Graph) -> Iterator[Violation]:
    """Q/DQ stand behind the second product, moves in between aside, or int8 attention is not fused [mha]."""
    for softmax, first, _ in _attentions(graph):
        for second in _products_of(softmax) if _is_quantized(first) else ():
            for node in _behind_moves(second):
                if node.op_type != QUANTIZE:
                    got = f"{node.op_type} {node.name}"
                    do = (
                        EIGHT_BITS
                        if node.op_type == "Clip"
                        else f"{PER_TENSOR}; or leave both attention products float"
                    )
                    yield Violation(nodes.name_of(second), "Q behind the second product", got, do)


#: Name of a rule -> the function that finds its violations.
RULES: dict[str, Callable[[ir.Graph], Iterator[Violation]]] = {
    "int8": _int8,
    "zero point": _zero_point,
    "positive scale": _scale,
    "per-tensor activations": _per_tensor,
    "output-channel axis": _weight_axis,
    "Q/DQ pair": _pair,
    "both operands": _both_operands,
    "DQ next to its product": _next_to_product,
    "attention scale in front of Q": _attention_scale,
    "one Q behind softmax": _softmax,
    "Q behind the second product": _behind_second,
}


def _is_quantized(product: ir.Node) -> bool:
    return all(nodes.maker(product, index, DEQUANTIZE) for index in (0, 1))


def _attentions(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node, list[ir.Node]]]:
    """Yield (softmax, first product, what lies between) for every softmax over a product of two activations."""
    for softmax in graph:
        if softmax.op_type != "Softmax":
            continue
        between: list[ir.Node] = []
        waiting = [nodes.maker(softmax, 0)]
        while waiting:
            node = waiting.pop()
            if node is None:
                continue
            if node.op_type == "MatMul":
                yield softmax, node, between
                break
            if node.op_type in {"Add", "Sub", "Mul", "Div", "Where", *MOVES}:
                between.append(node)
                waiting += [nodes.maker(node, index) for index in range(len(node.inputs))]


def _products_of(softmax: ir.Node) -> list[ir.Node]:
    """Return the products that read a softmax, through subtractions, clips, Q and DQ."""
    found, waiting = [], nodes.users(softmax)
    while waiting:
        node = waiting.pop()
        if node.op_type in PRODUCTS:
            found.append(node)
        elif node.op_type in {QUANTIZE, DEQUANTIZE, "Sub", "Clip", "Where"}:
            waiting += nodes.users(node)
    return found


def _behind_moves(node: ir.Node) -> list[ir.Node]:
    """Return what reads a value once operators that only move it are passed."""
    return [end for user in nodes.users(node) for end in (_behind_moves(user) if user.op_type in MOVES else [user])]
