"""Write the product of a matrix with a vector as one of two matrices: a product has rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.product_forms import form_of

aten = torch.ops.aten
#: Spellings of matmul for vectors alone: a matrix and a vector, two vectors.
OF_VECTORS = (torch.mv, "mv", aten.mv.default, torch.dot, "dot", aten.dot.default)
#: What these call the second operand.
SECOND = ("other", "vec", "tensor", "mat2")


@graph_pass(before=Stage.TRACED, after=Stage.TRACED)
def open_vector_products(graph_module: GraphModule) -> int:
    """Rewrite matmul(x, u) as matmul(x, u[:, None])[..., 0], matmul(u, x) alike, mv and dot too. Needs recorded shapes.

    x: (..., rows, inner), u: (inner,). The numbers agree up to the order of the sums.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        operands = _operands(node)
        if operands is not None and 1 in (dimensions := [len(shape_of(operand)) for operand in operands]):
            _open(node, *operands, *(number == 1 for number in dimensions))
            count += 1
    return count


def _operands(node: Node) -> tuple[Node, Node] | None:
    """Return both operands of a matmul, in whichever spelling, None for any other call."""
    form = form_of(node.target)
    if node.target not in OF_VECTORS and (form is None or form.function is not torch.matmul):
        return None
    named = dict(node.kwargs)
    first = node.args[0] if node.args else named.pop("input", None)
    second: Any = node.args[1] if len(node.args) > 1 else next((named.pop(key) for key in SECOND if key in named), None)
    return None if named or not isinstance(first, Node) or not isinstance(second, Node) else (first, second)


def _open(node: Node, lhs: Node, rhs: Node, is_row: bool, is_column: bool) -> None:
    call = Writer(node)
    rows = call(torch.unsqueeze, lhs, 0) if is_row else lhs
    columns = call(torch.unsqueeze, rhs, 1) if is_column else rhs
    out = call(torch.matmul, rows, columns)
    if is_column:
        out = call(torch.squeeze, out, -1)
    replace(node, call(torch.squeeze, out, -1 if is_column else -2) if is_row else out)
