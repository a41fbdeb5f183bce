"""Write integer products in the form of ONNX: DequantizeLinear on both operands, then a float MatMul."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, INTEGER_MATMUL
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.CONVERTED, after=Stage.QDQ)
def write_qdq(graph_module: GraphModule) -> int:
    """Replace integer_matmul(a, b) by matmul(dequantize(a), dequantize(b)): runtimes fuse that back.

    Codes that several products read are dequantized once.
    """
    graph = graph_module.graph
    dequantized: dict[Node, Node] = {}
    products = [node for node in graph.nodes if node.target is INTEGER_MATMUL]
    for node in products:
        operands = []
        for codes, scale, zero_point in (node.args[:3], node.args[3:]):
            if codes not in dequantized:
                # Behind the parameters, which all stand in front of this product, and in front of every other reader.
                with graph.inserting_before(node):
                    made = graph.call_function(DEQUANTIZE, (codes, scale, zero_point, 1))
                dequantized[codes] = adopt_meta(made, codes)
            operands.append(dequantized[codes])
        with graph.inserting_before(node):
            product = adopt_meta(graph.call_function(torch.matmul, tuple(operands)), node)
        product.meta["ptq4vit_op"] = node.meta["ptq4vit_op"]
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        product._rename(str(product.meta["ptq4vit_op"]).replace(".", "_"))
    return len(products)
