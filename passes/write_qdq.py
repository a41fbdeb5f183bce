"""Write integer products in the form of ONNX: DequantizeLinear on both operands, then a float MatMul."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, INTEGER_MATMUL
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.CONVERTED, after=Stage.QDQ)
def write_qdq(graph_module: GraphModule) -> int:
    """Replace integer_matmul(a, b) by matmul(dequantize(a), dequantize(b)): runtimes fuse that back.

    Codes that several products read are dequantized once.
    """
    dequantized: dict[Node, Node] = {}
    products = [node for node in graph_module.graph.nodes if node.target is INTEGER_MATMUL]
    for node in products:
        operands = []
        for codes, scale, zero_point in (node.args[:3], node.args[3:]):
            if codes not in dequantized:
                # Behind the parameters, which all stand in front of this product, and in front of every other reader.
                dequantized[codes] = Writer(node, like=codes)(DEQUANTIZE, codes, scale, zero_point, 1)
            operands.append(dequantized[codes])
        product = Writer(node)(torch.matmul, *operands)
        replace(node, product, product=product)
    return len(products)
