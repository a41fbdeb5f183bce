"""Write integer products in the form of ONNX: DequantizeLinear on both operands, then a float MatMul."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, INTEGER_MATMUL
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.stages import Stage

#: By matrix products: of the ways of torch.cdist the one that the exporter knows; and where torch takes it by default.
BY_PRODUCT, MANY_ROWS = "use_mm_for_euclid_dist", 25


@graph_pass(before=Stage.CONVERTED, after=Stage.QDQ)
def write_qdq(graph_module: GraphModule) -> int:
    """Replace integer_matmul(a, b) by matmul(dequantize(a), dequantize(b)): runtimes fuse that back.

    Codes that several products read are dequantized once. Distances (torch.cdist) are opened.
    """
    _open_distances(graph_module)
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


def _open_distances(graph_module: GraphModule) -> None:
    """Write torch.cdist as differences and their norm, or have it by a matrix product where torch takes that way.

    By default torch asks how many rows the operands have, which may be the batch: here the example decides.
    """
    for node in list(graph_module.graph.nodes):
        if node.target is not torch.cdist:
            continue
        named = dict(zip(("x1", "x2", "p", "compute_mode"), node.args, strict=False)) | node.kwargs
        x1, x2, p, mode = named["x1"], named["x2"], named.get("p", 2.0), named.get("compute_mode") or ""
        many = max(shape_of(x1)[-2], shape_of(x2)[-2]) > MANY_ROWS
        if p == 2 and (mode == BY_PRODUCT or (many and not mode.startswith("donot"))):
            node.args, node.kwargs = (x1, x2, p), {"compute_mode": BY_PRODUCT}
            continue
        call = Writer(node)
        differences = call(torch.sub, call(torch.unsqueeze, x1, -2), call(torch.unsqueeze, x2, -3))
        replace(node, call(torch.linalg.vector_norm, differences, p, -1))
