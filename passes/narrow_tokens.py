"""Compute only the tokens that somebody reads.

A classifier reads one token of the last block: its projection, MLP and norms, and the rows of its attention, need not
be computed for the others. Every operation between the attention's queries and the head treats tokens apart, so the
values that are left do not change.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.decompose_attention import add_mask
from ptq4vit_fx.passes.graph import activations
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import call_name, permutation
from ptq4vit_fx.passes.graph.rewriter import Writer
from ptq4vit_fx.passes.graph.shapes import is_tensor, shape_of
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.insert_quantizers import FakeQuantize

#: Calls that compute every element of their result from the elements at the same place.
ELEMENTWISE = frozenset(
    {
        *("add", "sub", "mul", "div", "truediv", "neg", "tanh", "exp", "contiguous", "clone", add_mask.__name__),
        *activations.ELEMENTWISE,
    }
)
#: Reshapes that are given every size, and those that are not.
SIZED = frozenset({"reshape", "view", "_unsafe_view"})
UNSIZED = frozenset({"flatten", "unflatten"})


@dataclass(frozen=True)
class Span:
    """The entries from start to stop of one dimension of a tensor."""

    dim: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@graph_pass(before=Stage.SIMULATED, after=Stage.SIMULATED)
def narrow_tokens(graph_module: GraphModule) -> int:
    """Narrow every operation of which no more than half is read, as far up as tokens stay apart; return their number.

    Nothing matches a model that reads all of its tokens, as one with average pooling does.
    """
    spans = _spans(graph_module)
    # Before any size changes. What wants a part of something and is not narrowed itself is a selection.
    wanted = {node: _wanted(graph_module, node, spans) for node in graph_module.graph.nodes}
    cut: dict[tuple[Node, Span], Node] = {}
    for node, parts in wanted.items():
        for operand, span in parts.items():
            has = spans.get(operand)
            start = has.start if has is not None else 0
            inside = Span(span.dim, span.start - start, span.stop - start)
            if node not in spans and has is not None:
                node.replace_all_uses_with(_select(operand, inside, like=node))
            elif node in spans and has != span:
                if (operand, span) not in cut:
                    cut[operand, span] = _select(operand, inside)
                node.replace_input_with(operand, cut[operand, span])
        if node in spans:
            _narrow(node, spans[node])
    return len(spans)


def _spans(graph_module: GraphModule) -> dict[Node, Span]:
    """Return the nodes of which no more than half is read and can be computed alone, with the part that is read."""
    spans: dict[Node, Span] = {}
    for node in reversed(graph_module.graph.nodes):
        wanted = [_wanted(graph_module, user, spans).get(node) for user in node.users]
        known = [span for span in wanted if span is not None]
        if not known or len(known) < len(wanted) or len({span.dim for span in known}) > 1:
            continue
        span = Span(known[0].dim, min(s.start for s in known), max(s.stop for s in known))
        if 2 * span.length <= shape_of(node)[span.dim] and _reads(graph_module, node, span.dim) is not None:
            spans[node] = span
    return spans


def _wanted(graph_module: GraphModule, node: Node, spans: dict[Node, Span]) -> dict[Node, Span]:
    """Return operand -> the part of it that this node reads, where that is not all of it."""
    selection = _selection(node)
    if selection is not None:
        return {node.all_input_nodes[0]: selection}
    span = spans.get(node)
    reads = _reads(graph_module, node, span.dim) if span is not None else None
    return {operand: Span(dim, span.start, span.stop) for operand, dim in reads.items()} if span and reads else {}


def _reads(graph_module: GraphModule, node: Node, dim: int) -> dict[Node, int] | None:
    """Return operand -> the dimension of which a part is enough for that part of dimension `dim` of the result.

    None if the node needs all of its operands for any part of its result, or if what it does is not known.
    """
    operands = [value for value in node.args if is_tensor(value)]
    if not operands or not is_tensor(node):
        return None
    name, shape, first = call_name(node), shape_of(node), operands[0]
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if not isinstance(module, FakeQuantize) or (module.axis is not None and module.axis % len(shape) == dim):
            return None
        return {first: dim}
    if name in ELEMENTWISE and len(node.all_input_nodes) == len(operands):
        aligned = [(value, dim - len(shape) + len(shape_of(value))) for value in operands]
        return _unless_batch({v: d for v, d in aligned if d >= 0 and shape_of(v)[d] == shape[dim]})
    if name == "linear":
        return _unless_batch({first: dim}) if dim < len(shape) - 1 else None
    if name == "layer_norm":
        sizes: Any = node.args[1] if len(node.args) > 1 else shape
        return _unless_batch({first: dim}) if dim < len(shape) - len(sizes) else None
    if name == "softmax":
        axis: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return _unless_batch({first: dim}) if isinstance(axis, int) and axis % len(shape) != dim else None
    if name == "matmul":
        rows = dim == len(shape) - 2 and len(shape_of(first)) == len(shape) and first is not operands[1]
        return _unless_batch({first: dim}) if rows else None
    order = permutation(node, len(shape))
    if order is not None:
        return _unless_batch({first: order[dim]})
    if name in SIZED | UNSIZED:
        return _reshaped(node, first, dim)
    return None


def _unless_batch(reads: dict[Node, int]) -> dict[Node, int] | None:
    """The first dimension of an operand may be, or hold, the batch, of which the example says nothing."""
    return reads if reads and all(reads.values()) else None


def _reshaped(node: Node, operand: Node, dim: int) -> dict[Node, int] | None:
    """Return the dimension as that of the operand if the reshape leaves it, and all in front of it, as they are."""
    if call_name(node) in SIZED and len(_sizes(node)) != len(shape_of(node)):
        return None
    same = shape_of(operand)[: dim + 1] == shape_of(node)[: dim + 1]
    return _unless_batch({operand: dim}) if same else None


def _sizes(node: Node) -> tuple[Any, ...]:
    """Return the sizes that a reshape is called with, in one argument or an argument each."""
    listed = len(node.args) == 2 and isinstance(node.args[1], (tuple, list))
    return tuple(node.args[1] if listed else node.args[1:])  # type: ignore[arg-type]


def _narrow(node: Node, span: Span) -> None:
    """Correct what a narrowed node says of its own size."""
    if call_name(node) in SIZED:
        sizes = _sizes(node)
        node.args = (node.args[0], (*sizes[: span.dim], span.length, *sizes[span.dim + 1 :]))


def _select(operand: Node, span: Span, like: Node | None = None) -> Node:
    """Insert the selection of a part behind its operand, or in place of the selection `like`."""
    single = like is not None and len(shape_of(like)) < len(shape_of(operand))
    entry = span.start if single else slice(span.start, span.stop)
    write = Writer(operand.next, like=operand) if like is None else Writer(like)
    return write(operator.getitem, operand, (*(slice(None) for _ in range(span.dim)), entry))


def _selection(node: Node) -> Span | None:
    """Return the part that a selection reads, as `x[:, 0]` or `x.select(1, 0)` do, None if it is no such selection.

    Nothing is known of the size and of the end of the first dimension, the batch.
    """
    if len(node.args) < 2 or not is_tensor(node.args[0]) or not is_tensor(node):
        return None
    index: Any
    name, shape, dim, index = call_name(node), shape_of(node.all_input_nodes[0]), node.args[1], None
    if name == "getitem":
        entries = dim if isinstance(dim, tuple) else (dim,)
        partial = [(place, entry) for place, entry in enumerate(entries) if entry != slice(None)]
        if len(partial) != 1 or not all(isinstance(entry, (int, slice)) for entry in entries):
            return None
        ((dim, index),) = partial
    elif name == "select" and len(node.args) == 3:
        index = node.args[2]
    elif name == "slice" and len(node.args) == 4:
        index = slice(*node.args[2:])
    bounds = [index.start, index.stop, index.step] if isinstance(index, slice) else [index]
    known = all(bound is None or (isinstance(bound, int) and bound >= 0) for bound in bounds)
    if index is None or not isinstance(dim, int) or dim % len(shape) == 0 or not known:
        return None
    dim %= len(shape)
    if isinstance(index, int):
        return Span(dim, index, index + 1)
    start, stop, step = index.indices(shape[dim])
    return Span(dim, start, stop) if step == 1 and start < stop else None
