"""Target `openvino`: zero point 0 wherever two activations are multiplied, one Q and one DQ per operand, 256 levels.

Sources, all in https://github.com/openvinotoolkit/openvino:
- src/common/low_precision_transformations/src/mat_mul.cpp, canBeTransformed: a product of two activations stays float
  if either has a zero point; the weights of a linear layer must have none, its activations may. Measured: with the
  default file's zero points two products of a block run in float, without them none (tests/test_openvino.py).
- the same file, separateInStandaloneBranch: dequantization that several products read is split, as it is written here.
- tests/test_openvino.py, test_why_bounds_stand_in_front_of_the_division: OpenVINO 2026.4 computes a division by scales
  per head, a Clip and a QuantizeLinear wrongly; bounds per head in front of the division are computed right.
- src/plugins/intel_cpu/src/transformations/transformation_pipeline.cpp: precisions of products are u8 or i8 on the
  left and i8 on the right; ONNX QuantizeLinear on 8 bits becomes a FakeQuantize of 256 levels.
"""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ptq4vit_fx.errors import PTQWarning, failure
from ptq4vit_fx.export.containers import DEQUANTIZE, INT8, QUANTIZE, UINT8, without_zero_points
from ptq4vit_fx.export.onnx_graph import PRODUCTS, OnnxGraph
from ptq4vit_fx.export.targets.generic import check_generic
from ptq4vit_fx.plan import QuantPlan


def rewrite_openvino(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """Return a copy without zero points (int8 for signed grids, uint8 for the rest) and without shared pairs.

    Codes on both sides of zero that fit neither type (behind GELU) keep their zero point if they multiply a weight.
    """
    without, kept = without_zero_points(model, plan, (INT8, UINT8))
    stuck = [name for name in kept if not plan.op(name.partition(":")[0]).rhs_is_weight]
    if stuck:
        raise failure(
            "export_onnx",
            f"node {stuck[0]}",
            expected="codes that int8 or uint8 holds with zero point 0",
            got=f"codes that need another, in a product of two activations, the first of {len(stuck)}",
            do='use recipes.ptq4vit(twins="exact"), or a target of ONNX Runtime',
        )
    return separate_pairs(bound_in_front_of_division(without))


def bound_in_front_of_division(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn Div by scales per head -> Clip into Min and Max per head -> Div; in place, and exact.

    The Clip's bounds are codes times the quantizer's scale; such a value times a head's scale divides back to it.
    """
    graph = OnnxGraph(model)
    for clip in graph.nodes:
        divide = graph.maker(clip, 0) if clip.op_type == "Clip" else None
        if divide is None or divide.op_type != "Div" or divide.input[1] not in graph.constants:
            continue
        scales, source = graph.value(divide.input[1]), divide.input[0]
        position = list(model.graph.node).index(divide)
        for function, name in zip(("Max", "Min"), clip.input[1:], strict=False):
            if not name:
                continue
            bound = f"{clip.output[0]}.{function.lower()}"
            values = (graph.value(name) * scales).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(values, f"{bound}.bound"))
            made = helper.make_node(function, [source, f"{bound}.bound"], [bound], name=f"{clip.name}_{function}")
            model.graph.node.insert(position, made)
            source, position = bound, position + 1
        node = next(node for node in model.graph.node if node.name == divide.name)
        node.input[0], node.output[0] = source, clip.output[0]
        model.graph.node.remove(clip)
    return model


def separate_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every reader its own DequantizeLinear, and each of those its own QuantizeLinear; in place."""
    nodes: list[onnx.NodeProto] = []
    copies: Counter[str] = Counter()
    graph = OnnxGraph(model)
    renamed: dict[tuple[str, int], str] = {}  # (name of the reader, input) -> tensor
    for node in graph.nodes:
        if node.op_type == QUANTIZE:
            continue  # written in front of its DequantizeLinear
        if node.op_type != DEQUANTIZE:
            for index in range(len(node.input)):
                node.input[index] = renamed.get((node.name, index), node.input[index])
            nodes.append(node)
            continue
        places = [(user.name, i) for user in graph.users(node) for i, x in enumerate(user.input) if x == node.output[0]]
        for number, place in enumerate(places):
            pair = _pair(graph, node, number, copies)
            renamed[place] = pair[-1].output[0]
            nodes += pair
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _pair(graph: OnnxGraph, dequantize: onnx.NodeProto, number: int, copies: Counter[str]) -> list[onnx.NodeProto]:
    """Return copy `number` of a DequantizeLinear, behind a QuantizeLinear of its own unless it reads a constant."""
    copy = _numbered(dequantize, number)
    source = graph.maker(dequantize, 0)
    if source is None or source.op_type != QUANTIZE:
        return [copy]
    quantize = _numbered(source, copies[source.name])
    copies[source.name] += 1
    copy.input[0] = quantize.output[0]
    return [quantize, copy]


def _numbered(node: onnx.NodeProto, number: int) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    if number:
        copy.name, copy.output[0] = f"{node.name}_{number}", f"{node.output[0]}_{number}"
    return copy


def check_openvino(model: onnx.ModelProto) -> None:
    """Raise PTQError, naming the node, if a rule is broken; warn of products that OpenVINO will compute in float."""
    check_generic(model)
    graph = OnnxGraph(model)
    for node in graph.nodes:
        if node.op_type not in (QUANTIZE, DEQUANTIZE):
            continue
        readers = graph.users(node)
        places = sum(list(user.input).count(node.output[0]) for user in readers)
        zero_points = graph.value(node.input[2])
        wanted, got = "one reader", f"{places}"
        if graph.constants[node.input[2]].data_type not in (TensorProto.INT8, TensorProto.UINT8):
            wanted, got = "8-bit codes (256 levels)", str(zero_points.dtype)
        elif np.any(zero_points) and not _multiplies_weight(graph, node):
            wanted, got = "zero point 0", f"{zero_points.reshape(-1)[0]}"
        if (wanted, got) != ("one reader", "1"):
            raise failure("export_onnx", f"node {node.name}", expected=wanted, got=got, do="report this as a bug")
    for node in graph.nodes:
        if node.op_type in PRODUCTS and (site := _unsigned_right(graph, node)):
            reason = "its second operand has unsigned codes above 127, and OpenVINO multiplies int8 on that side only"
            warnings.warn(f"{site} will run in float in OpenVINO: {reason}", PTQWarning, stacklevel=2)


def _multiplies_weight(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Return whether these codes are the first operand of products with constant codes."""
    readers = graph.users(node)
    if readers and all(reader.op_type == DEQUANTIZE for reader in readers):
        return all(_multiplies_weight(graph, reader) for reader in readers)
    rights = [graph.maker(reader, 1) for reader in readers if reader.op_type in PRODUCTS]
    constant = [right is not None and right is not node and right.input[0] in graph.constants for right in rights]
    return len(constant) == len(readers) and all(constant)


def _unsigned_right(graph: OnnxGraph, product: onnx.NodeProto) -> str | None:
    right = graph.maker(product, 1)
    if right is None or right.op_type != DEQUANTIZE:
        return None
    return product.name if graph.constants[right.input[2]].data_type == TensorProto.UINT8 else None
