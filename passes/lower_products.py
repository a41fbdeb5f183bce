"""Compute products on the integer codes, as the deployed model does."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta, get_attribute
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, INTEGER_MATMUL
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.CONVERTED, after=Stage.CONVERTED)
def lower_products(graph_module: GraphModule) -> int:
    """Replace matmul(dequantize(a), dequantize(b)) by integer_matmul(a, b).

    A float product of dequantized operands rounds every partial sum, an integer kernel none: one quantizer later the
    two differ in whole codes. Convolutions that overlap stay float products: no runtime has an integer one for them.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is torch.matmul and "ptq4vit_op" in node.meta and _is_integer(graph_module, node):
            lhs, rhs = (operand.args[:3] for operand in cast("tuple[Node, Node]", node.args))
            with graph_module.graph.inserting_before(node):
                product = graph_module.graph.call_function(INTEGER_MATMUL, (*lhs, *rhs))
            adopt_meta(product, node).meta["ptq4vit_op"] = node.meta["ptq4vit_op"]
            node.replace_all_uses_with(product)
            graph_module.graph.erase_node(node)
            product._rename(str(product.meta["ptq4vit_op"]).replace(".", "_"))
            count += 1
    return count


def _is_integer(graph_module: GraphModule, node: Node) -> bool:
    """Return whether both operands are codes, the lhs with one scale, the rhs with one or one per column."""
    lhs, rhs = cast("tuple[Node, Node]", node.args)
    if lhs.target is not DEQUANTIZE or rhs.target is not DEQUANTIZE:
        return False
    dimensions = [get_attribute(graph_module, str(cast("Node", dq.args[1]).target)).ndim for dq in (lhs, rhs)]
    codes, axis = cast("Node", rhs.args[0]), rhs.args[3]
    is_matrix = codes.op == "get_attr" and get_attribute(graph_module, str(codes.target)).ndim == 2
    return dimensions == [0, 0] or (dimensions == [0, 1] and is_matrix and bool(axis == 1))
