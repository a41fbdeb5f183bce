"""Write chunk, split and unbind as slices where torch or ONNX takes no other form of them."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.behaviour import sizes_on_another_batch
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import call_name, may_be_view, overwrites
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import RESULT, shape_of
from ptq4vit_fx.passes.graph.stages import Stage

#: Calls that return several views of one tensor, and what they call their second argument.
PIECES = {
    **{"chunk": "chunks", "unsafe_chunk": "chunks"},
    **{"split": "split_size_or_sections", "split_with_sizes": "split_sizes"},
}


@graph_pass(before=Stage.CANONICAL, after=Stage.CANONICAL)
def slice_pieces(graph_module: GraphModule) -> int:
    """Let readers of a piece read a slice instead, if something writes into a piece, or if images are in pieces.

    torch forbids to write into one of several views while it computes gradients; its exporter takes the batch for a
    constant where the number of pieces could depend on it.
    """
    written = {piece for node in graph_module.graph.nodes if overwrites(node) for piece in _views_behind(node)}
    found = [node for node in graph_module.graph.nodes if _is_taken_apart(node)]
    images = {node.args[0]: node for node in found if call_name(node) == "chunk" and _dimension(node) == 0}
    others = sizes_on_another_batch(graph_module, images.keys()) if images else {}
    count = 0
    for node in found:
        of_images = _dimension(node) == 0 and _depends_on_the_batch(node)
        if node not in written and not of_images:
            continue
        for reader in list(node.users):
            other = others.get(node.args[0])
            replace(reader, _piece(node, reader, of_images, other))
        count += 1
    return count


def _views_behind(node: Node) -> list[Node]:
    """Return the views that this node writes through, the nearest first."""
    found, value = [], node.args[0] if node.args else None
    while isinstance(value, Node) and may_be_view(value):
        found.append(value)
        value = value.args[0]
    return found


def _is_taken_apart(node: Node) -> bool:
    """Return whether a node returns pieces of known shape, each of which is read by its number."""
    if call_name(node) not in (*PIECES, "tensor_split", "unbind") or not isinstance(
        node.meta.get(RESULT), (tuple, list)
    ):
        return False
    by_number = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    return by_number and isinstance(node.args[0], Node)


def _dimension(node: Node) -> int:
    position = 1 if call_name(node) == "unbind" else 2
    dim: Any = node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)
    return int(dim) % len(shape_of(node.args[0]))  # type: ignore[arg-type]


def _size(node: Node) -> Any:
    name = PIECES[call_name(node)]
    return node.args[1] if len(node.args) > 1 else node.kwargs.get(name, node.kwargs.get("split_size"))


def _depends_on_the_batch(node: Node) -> bool:
    """Return whether the first dimension is cut in a number of pieces that is known, whatever the batch."""
    if call_name(node) not in PIECES:
        return False
    size = _size(node)
    return call_name(node).endswith("chunk") or not isinstance(size, int)


def _piece(node: Node, reader: Node, of_images: bool, other: torch.Size | None) -> Node:
    """Insert in front of the pieces' node the slice that a reader of one of them reads."""
    write, x, dim = Writer(node), node.args[0], _dimension(node)
    results = node.meta[RESULT]
    number = cast("int", reader.args[1]) % len(results)
    if call_name(node) == "unbind":
        return write(torch.select, x, dim, number)
    if of_images:
        bounds = _bounds_of_images(write, node, number, other)
    else:
        sizes = [result.shape[dim] for result in results]
        bounds = (sum(sizes[:number]), sum(sizes[: number + 1]))
    return write(operator.getitem, x, (*(slice(None),) * dim, slice(*bounds)))


def _bounds_of_images(write: Writer, node: Node, number: int, other: torch.Size | None) -> tuple[Any, Any]:
    """Return the first image of a piece and the one behind its last, computed from the batch."""
    size = _size(node)
    if isinstance(size, (tuple, list)):
        ends: list[Any] = [0]
        for own in size[: number + 1]:
            ends.append(own if ends[-1] == 0 else write(operator.add, ends[-1], own))
        return ends[number], ends[number + 1]
    if call_name(node).endswith("chunk"):
        images = write.method("size", node.args[0], 0)
        divides = other is not None and not other[0] % size and not shape_of(node.args[0])[0] % size  # type: ignore[arg-type]
        # rounded up, but not where this leaves the exporter with a quotient that it cannot simplify
        size = write(operator.floordiv, images if divides else write(operator.add, images, size - 1), size)
    return (write(operator.mul, size, number) if number else 0), write(operator.mul, size, number + 1)
