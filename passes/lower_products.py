"""Compute products on the integer codes, as the deployed model does."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import is_stored
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, INTEGER_MATMUL
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.stages import FLOAT_PRODUCTS, Stage
from ptq4vit_fx.plan import FloatOp


@graph_pass(before=Stage.LOWERED, after=Stage.CONVERTED)
def lower_products(graph_module: GraphModule) -> int:
    """Replace matmul(dequantize(a), dequantize(b)) by integer_matmul(a, b).

    A float product of dequantized operands rounds every partial sum, an integer kernel none: one quantizer later the
    two differ in whole codes. Products that no runtime multiplies as integers stay, and are listed with the reason.
    """
    count, stays = 0, {}
    for node, name in planned_products(graph_module.graph):
        if reason := _float_reason(node):
            stays[name] = FloatOp(name, reason)
            continue
        lhs, rhs = (operand.args[:3] for operand in cast("tuple[Node, Node]", node.args))
        product = Writer(node)(INTEGER_MATMUL, *lhs, *rhs)
        replace(node, product, product=product)
        count += 1
    graph_module.meta[FLOAT_PRODUCTS] = tuple(stays.values())
    return count


def _float_reason(node: Node) -> str | None:
    """Return why a product cannot be one of integers, None if it can.

    Both operands must be codes, the lhs with one scale, the rhs with one or, as a matrix, with one per column.
    """
    if node.target is not torch.matmul:
        return "its windows overlap, and no runtime has an integer convolution with float output"
    lhs, rhs = cast("tuple[Node, Node]", node.args)
    if lhs.target is not DEQUANTIZE:
        return "its first operand stays float"
    if rhs.target is torch.transpose:
        return "its weight is computed and transposed behind its quantizer"
    if rhs.target is not DEQUANTIZE:
        return "its second operand stays float"
    scales = [len(shape_of(cast("Node", operand.args[1]))) for operand in (lhs, rhs)]
    codes = rhs.args[0]
    per_column = scales[1] == 1 and is_stored(codes) and len(shape_of(codes)) == 2 and rhs.args[3] == 1
    if scales[0] or (scales[1] and not per_column):
        return "an operand has scales along an axis that is summed over"
    return None
