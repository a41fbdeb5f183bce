"""Write an einsum of two operands as a matrix product between permutations: the product must be seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.stages import Stage


@dataclass(frozen=True)
class Contraction:
    """out[batch, left, right] = sum of lhs[batch, left, summed] * rhs[batch, summed, right], as labels."""

    lhs: str
    rhs: str
    out: str

    @property
    def batch(self) -> str:
        return "".join(label for label in self.lhs if label in self.rhs and label in self.out)

    @property
    def summed(self) -> str:
        return "".join(label for label in self.lhs if label in self.rhs and label not in self.out)

    @property
    def left(self) -> str:
        return "".join(label for label in self.lhs if label not in self.rhs)

    @property
    def right(self) -> str:
        return "".join(label for label in self.rhs if label not in self.lhs)

    def is_matrix_product(self) -> bool:
        """Return whether no label repeats in an operand, none but `summed` is summed over, and something is."""
        unique = all(len(set(labels)) == len(labels) for labels in (self.lhs, self.rhs, self.out))
        return unique and bool(self.summed) and set(self.out) == {*self.batch, *self.left, *self.right}


@graph_pass(before=Stage.TRACED, after=Stage.TRACED)
def open_einsum(graph_module: GraphModule) -> int:
    """Rewrite einsum(equation, a, b) as permute, flatten, matmul, unflatten, permute. Needs recorded shapes.

    Left alone, and reported as float: another number of operands, a diagonal (`ii`), a sum within one operand, products
    without a sum, operands that broadcast.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        contraction = _contraction(node) if node.target is torch.einsum and len(node.args) == 3 else None
        if contraction is not None:
            replace(node, _open(node, contraction))
            count += 1
    return count


def _contraction(node: Node) -> Contraction | None:
    equation, a, b = node.args
    if not isinstance(equation, str) or not isinstance(a, Node) or not isinstance(b, Node) or "->" not in equation:
        return None
    lhs, rhs = (shape_of(operand) for operand in (a, b))
    terms, out = equation.replace(" ", "").split("->")
    labels = terms.split(",")
    hidden = [len(shape) - len(text.replace("...", "")) for shape, text in zip((lhs, rhs), labels, strict=True)]
    if len({n for n, text in zip(hidden, labels, strict=True) if "..." in text}) > 1:
        return None  # ellipses of different length broadcast
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    first, second, out = (text.replace("...", "".join(free[: max(hidden)])) for text in (*labels, out))
    contraction = Contraction(first, second, out)
    sizes = dict(zip(first, lhs, strict=True))
    same = all(sizes.get(label, size) == size for label, size in zip(second, rhs, strict=True))
    return contraction if same and contraction.is_matrix_product() else None


def _open(node: Node, c: Contraction) -> Node:
    a, b = node.all_input_nodes if len(node.all_input_nodes) == 2 else node.all_input_nodes * 2
    call = Writer(node)

    def permuted(x: Any, have: str, want: str) -> Any:
        return x if have == want else call(torch.permute, x, tuple(have.index(label) for label in want))

    def merged(x: Any, start: int, length: int) -> Any:
        if length == 0:
            return call(torch.unsqueeze, x, start)
        return x if length == 1 else call(torch.flatten, x, start, start + length - 1)

    shared = len(c.batch)
    lhs = merged(permuted(a, c.lhs, c.batch + c.left + c.summed), shared, len(c.left))
    lhs = merged(lhs, shared + 1, len(c.summed))
    rhs = merged(permuted(b, c.rhs, c.batch + c.summed + c.right), shared, len(c.summed))
    rhs = merged(rhs, shared + 1, len(c.right))
    out = call(torch.matmul, lhs, rhs)
    sizes = dict(zip(c.lhs + c.rhs, shape_of(a) + shape_of(b), strict=True))
    # A batch comes first in its operand: that size is left to the call.
    for labels, axis, dynamic in ((c.right, shared + 1, c.rhs[0]), (c.left, shared, c.lhs[0])):
        if not labels:
            out = call(torch.squeeze, out, axis)
        elif len(labels) > 1:
            shape = tuple(-1 if label == dynamic else sizes[label] for label in labels)
            out = call(torch.unflatten, out, axis, shape)
    result: Node = permuted(out, c.batch + c.left + c.right, c.out)
    return result
