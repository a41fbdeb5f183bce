"""Write every quantized linear as matmul and add, its int8 weight stored (inner, columns)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ptq4vit_fx.names import leaf_of, owner_of
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import get_attribute, stored_path
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.LOWERED, after=Stage.LOWERED)
def lower_linears(graph_module: GraphModule) -> int:
    """Replace linear(x, w, b) by matmul(x, w transposed) + b.

    A folded weight is transposed in storage, scales along axis 1: the layout that runtimes fuse into an integer MatMul
    without a Transpose at run time. A computed weight is transposed in the graph.
    """
    linears = [node for node, _ in planned_products(graph_module.graph) if node.target is F.linear]
    transposed: dict[Node, Node] = {}
    for node in linears:
        weight = cast("Node", node.args[1])
        if weight not in transposed:
            transposed[weight] = _transpose(graph_module, weight)
        _write(node, transposed[weight])
    return len(linears)


def _transpose(graph_module: GraphModule, weight: Node) -> Node:
    path = stored_path(weight.args[0]) if weight.target is DEQUANTIZE else ""
    if path:
        codes = get_attribute(graph_module, path)
        setattr(graph_module.get_submodule(owner_of(path)), leaf_of(path), codes.t().contiguous())
        if shape_of(cast("Node", weight.args[1])):
            weight.update_arg(3, 1)
        return weight
    return Writer(weight.next, like=weight)(torch.transpose, weight, -2, -1)


def _write(node: Node, weight: Node) -> None:
    lhs, _, bias = node.args
    write = Writer(node)
    result = product = write(torch.matmul, lhs, weight)
    if bias is not None:
        result = write(torch.add, product, bias)
    if len(shape_of(node)) == 2:
        result = write(torch.squeeze, result, 0)
        product.update_arg(0, _with_dimension(cast("Node", lhs)))
    replace(node, result, product=product)


def _with_dimension(lhs: Node) -> Node:
    """Return the lhs of a product of matrices with three dimensions, in front of its quantizer if it has one.

    ONNX Runtime turns a two-dimensional MatMul and Add into Gemm, for which it has no integer kernel with float
    output (onnxruntime/core/optimizer/matmul_add_fusion.cc); with three dimensions the product stays MatMul.
    """
    if lhs.target is not DEQUANTIZE:
        return Writer(lhs.next, like=lhs)(torch.unsqueeze, lhs, 0)
    quantize = cast("Node", lhs.args[0])
    quantize.update_arg(0, Writer(quantize)(torch.unsqueeze, quantize.args[0], 0))
    return lhs
