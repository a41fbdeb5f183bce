"""Write every quantized linear as matmul and add, its int8 weight stored (inner, columns)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta, get_attribute
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.CONVERTED, after=Stage.CONVERTED)
def lower_linears(graph_module: GraphModule) -> int:
    """Replace linear(x, w, b) by matmul(x, w transposed) + b.

    A folded weight is transposed in storage, scales along axis 1: the layout that runtimes fuse into an integer MatMul
    without a Transpose at run time. A computed weight is transposed in the graph.
    """
    linears = [n for n in graph_module.graph.nodes if n.target is F.linear and "ptq4vit_op" in n.meta]
    transposed: dict[Node, Node] = {}
    for node in linears:
        weight = node.args[1]
        assert isinstance(weight, Node)
        if weight not in transposed:
            transposed[weight] = _transpose(graph_module, weight)
        _write(graph_module, node, transposed[weight])
    return len(linears)


def _transpose(graph_module: GraphModule, weight: Node) -> Node:
    stored = weight.args[0] if weight.target is DEQUANTIZE else None
    if isinstance(stored, Node) and stored.op == "get_attr":
        owner, _, leaf = str(stored.target).rpartition(".")
        codes = get_attribute(graph_module, str(stored.target))
        setattr(graph_module.get_submodule(owner), leaf, codes.t().contiguous())
        if _ndim(graph_module, weight.args[1]):
            weight.update_arg(3, 1)
        return weight
    with graph_module.graph.inserting_after(weight):
        return adopt_meta(graph_module.graph.call_function(torch.transpose, (weight, -2, -1)), weight)


def _ndim(graph_module: GraphModule, scale: object) -> int:
    assert isinstance(scale, Node)
    return int(get_attribute(graph_module, str(scale.target)).ndim)


def _write(graph_module: GraphModule, node: Node, weight: Node) -> None:
    graph = graph_module.graph
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    flat = len(node.meta["tensor_meta"].shape) == 2
    with graph.inserting_before(node):
        result = product = adopt_meta(graph.call_function(torch.matmul, (node.args[0], weight)), node)
        if bias is not None:
            result = adopt_meta(graph.call_function(torch.add, (product, bias)), node)
        if flat:
            result = adopt_meta(graph.call_function(torch.squeeze, (result, 0)), node)
    if flat:
        _add_dimension(graph_module, product)
    product.meta["ptq4vit_op"] = node.meta["ptq4vit_op"]
    name = node.name
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    product._rename(name)


def _add_dimension(graph_module: GraphModule, product: Node) -> None:
    """Make the lhs of a product of matrices three-dimensional, in front of its quantizer.

    ONNX Runtime turns a two-dimensional MatMul and Add into Gemm, for which it has no integer kernel with float
    output (onnxruntime/core/optimizer/matmul_add_fusion.cc); with three dimensions the product stays MatMul.
    """
    dequantize = product.args[0]
    assert isinstance(dequantize, Node)
    quantize = dequantize.args[0]
    assert isinstance(quantize, Node)
    with graph_module.graph.inserting_before(quantize):
        deeper = graph_module.graph.call_function(torch.unsqueeze, (quantize.args[0], 0))
    quantize.update_arg(0, adopt_meta(deeper, quantize))
