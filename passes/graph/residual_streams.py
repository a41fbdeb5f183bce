"""Residual streams: values that are added to each other, what writes and reads them, and what forbids a rotation.

A stream is followed in both directions from the input of a normalization: through additions, moves, concatenations,
averages over tokens, what all channels of a token share, and normalizations without weights, for all of these commute
with a rotation of the channels that keeps their mean. A normalization with weights commutes once its readers have
absorbed them, so behind one nothing but products with stored weights may read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.activations import MULTIPLICATIONS
from ptq4vit_fx.passes.graph.channel_places import Channels, moved, moved_back, shifts, source_of, stacked, unstacked
from ptq4vit_fx.passes.graph.dataflow import call_name, get_attribute, is_stored, moves_only
from ptq4vit_fx.passes.graph.marks import kind_of
from ptq4vit_fx.passes.graph.norms import Affine, affine_of, factor_of, is_measured, norm_input, normalizes
from ptq4vit_fx.passes.graph.shapes import is_tensor, shape_of
from ptq4vit_fx.passes.graph.streams import ADDITIONS, LayerScale, Reader, Stream, described, reads_shape

CONCATENATIONS = ("cat", "concat", "concatenate")
DIVISIONS = (torch.div, operator.truediv, "div")
#: Why a node forbids a rotation.
READS, WRITES = "reads the stream", "computes the stream"
JOINS = "has weights, and its output joins the stream"


def residual_streams(graph_module: GraphModule) -> Iterator[Stream]:
    """Yield the residual streams of a canonical graph with shapes, in the order of their first normalization."""
    seen: set[Node] = set()
    for node in list(graph_module.graph.nodes):
        start = norm_input(graph_module, node)
        if start is None or start in seen or shape_of(start)[-1] < 2:
            continue
        stream = _Search(graph_module, Stream(described(node), shape_of(start)[-1])).run(start)
        seen |= {value for value, at in stream.values.items() if at.affine is None}
        if stream.is_residual:
            yield stream


class _Search:
    """Follows a stream from one value of it in both directions."""

    def __init__(self, graph_module: GraphModule, stream: Stream) -> None:
        self._graph_module, self._stream = graph_module, stream
        self._queue, self._joined = list[Node](), list[Node]()

    def run(self, start: Node) -> Stream:
        self._reach(start, Channels(-1))
        while self._queue:
            node = self._queue.pop(0)
            at = self._stream.values[node]
            if at.affine is None:
                self._follow_back(node, at.channels)
            for user in list(node.users):
                self._follow(node, user, at)
        self._check_joined()
        return self._stream

    def _reach(self, node: Node, channels: Channels | None, affine: Affine | None = None) -> None:
        if channels is None:
            self._fault(node, "does not keep its channels together")
            return
        at = Reader(channels, affine)
        if node not in self._stream.values:
            self._stream.values[node] = at
            self._queue.append(node)
        elif (known := self._stream.values[node]) != at:
            weighted = known.affine or affine
            reason = JOINS if weighted is not None else "brings channels together in two orders"
            self._fault(weighted.node if weighted is not None else node, reason)

    def _fault(self, node: Node, reason: str) -> None:
        self._stream.faults.append((node, f"{described(node)} {reason}"))

    def _follow_back(self, node: Node, channels: Channels) -> None:
        """Reach what a value is computed from."""
        graph_module = self._graph_module
        source = source_of(graph_module, node)
        if is_stored(node):
            self._stream.constants[node] = channels
        elif kind_of(node) is not None:
            self._write(node, channels)
        elif normalizes(graph_module, node, channels):
            if affine_of(graph_module, node) is not None:
                self._fault(node, JOINS)
            else:
                self._reach(cast("Node", norm_input(graph_module, node)), channels)
        elif source is not None:
            self._reach(source[0], moved_back(graph_module, source[1], source[0], channels, self._stream.width))
        elif call_name(node) in ADDITIONS:
            self._reach_operands(node, node.args[:2], channels)
        elif call_name(node) in CONCATENATIONS:
            self._reach_pieces(node, channels)
        elif call_name(node) == "stack":
            for piece in cast("Any", node.args[0]):
                self._reach(piece, unstacked(node, channels))
        elif node.target in (*MULTIPLICATIONS, *DIVISIONS):
            self._scale_back(node, channels)
        else:
            self._fault(node, "is an input of the model" if node.op == "placeholder" else WRITES)

    def _reach_operands(self, node: Node, operands: Any, channels: Channels) -> None:
        for operand in operands:
            if is_tensor(operand) and not self._is_shared(operand, channels):
                fits = shape_of(operand)[channels.dim :][:1] == shape_of(node)[channels.dim :][:1]
                self._reach(operand, channels if fits else None)
            elif isinstance(operand, Node) and not is_tensor(operand):
                self._fault(node, WRITES)

    def _reach_pieces(self, node: Node, channels: Channels) -> None:
        """Reach what is concatenated, tokens or channels: of these, whole blocks."""
        pieces: Any = node.args[0]
        for piece in pieces:
            size = shape_of(piece)[channels.dim]
            whole = size % self._stream.width == 0
            self._reach(piece, Channels(channels.dim, size // self._stream.width) if whole else None)

    def _scale_back(self, node: Node, channels: Channels) -> None:
        """Reach the factor that has the channels, if all channels of a token share the other; else a LayerScale."""
        factors = [x for x in node.args[:2] if is_tensor(x) and not self._is_shared(x, channels)]
        if len(factors) == 1 and (factors[0] is node.args[0] or node.target in MULTIPLICATIONS):
            self._reach(factors[0], channels)
            return
        for value in factors:
            path = factor_of(node, value, channels)
            if path is not None and value is not node and not is_stored(value):
                self._scale_product(node, value, channels, path)
                return
        self._fault(node, WRITES)

    def _scale_product(self, node: Node, value: Node, channels: Channels, path: str) -> None:
        """Find the product that a LayerScale multiplies, in front of moves that nobody else reads."""
        place: Channels | None = channels
        while place is not None and len(self._readers_of(value)) == 1:
            if kind_of(value) is not None:
                self._stream.scales[value] = LayerScale(node, path)
                self._write(value, place)
                return
            source = source_of(self._graph_module, value)
            if source is None or shifts(value):
                break
            place = moved_back(self._graph_module, source[1], source[0], place, self._stream.width)
            value = source[0]
        self._fault(node, "multiplies channels, and not behind a product that can take the factors")

    def _is_shared(self, value: Node, channels: Channels) -> bool:
        """Return whether a value is the same for all channels of a token."""
        shape = shape_of(value)
        return len(shape) < -channels.dim or shape[channels.dim] == 1

    def _write(self, node: Node, channels: Channels) -> None:
        if not self._has_stored_weights(node, channels):
            self._fault(node, _grouped(node) or WRITES)
        elif self._stream.writers.setdefault(node, channels) != channels:
            self._fault(node, "writes channels in two orders")

    def _has_stored_weights(self, node: Node, channels: Channels) -> bool:
        """Return whether a product mixes all channels of a place with stored weights, and has a stored bias, if any."""
        kind = kind_of(node)
        if not is_stored(node.args[1]) or channels.dim != (-3 if kind == "conv2d" else -1):
            return False
        if kind == "matmul":
            return len(shape_of(node.args[1])) == 2
        return (node.args[2] is None or is_stored(node.args[2])) and (kind == "linear" or bool(node.args[6] == 1))

    def _readers_of(self, node: Node) -> list[Node]:
        return [user for user in node.users if not reads_shape(user, node)]

    def _follow(self, node: Node, user: Node, at: Reader) -> None:
        """Reach what is computed from a value, unless its channels end there."""
        source = source_of(self._graph_module, user)
        if reads_shape(user, node) or (at.affine is None and is_measured(user, at.channels)):
            return
        if user.op == "output":
            self._fault(user, "returns the stream")
        elif kind_of(user) is not None:
            self._read(node, user, at)
        elif source is not None:
            self._move(user, source[1], at)
        elif not is_tensor(user) and moves_only(user):
            for piece in user.users:
                self._move_piece(node, user, piece, at)
        elif at.affine is not None and call_name(user) in CONCATENATIONS and is_tensor(user):
            self._join(user, at)
        elif at.affine is not None:
            self._fault(user, f"reads {described(at.affine.node)}, whose weights it cannot take")
        elif normalizes(self._graph_module, user, at.channels):
            affine = affine_of(self._graph_module, user)
            if affine is not None:
                self._stream.affines[user] = affine
            self._reach(user, at.channels, affine)
        else:
            self._combine(node, user, at.channels)

    def _join(self, user: Node, at: Reader) -> None:
        """Follow what is behind the weights of a norm into a concatenation, all of whose pieces must be behind them."""
        unit, size = cast("Affine", at.affine).size, shape_of(user)[at.channels.dim]
        self._joined.append(user)
        self._reach(user, Channels(at.channels.dim, size // self._stream.width) if not size % unit else None, at.affine)

    def _check_joined(self) -> None:
        for node in self._joined:
            pieces: Any = node.args[0]
            found = [self._stream.values.get(piece) for piece in pieces]
            if len({at and (at.channels.dim, at.affine) for at in found}) > 1:
                self._fault(node, "concatenates what is behind the weights of a norm with other values")

    def _move_piece(self, node: Node, user: Node, piece: Node, at: Reader) -> None:
        if source_of(self._graph_module, piece) is None:
            self._fault(user, READS)
        else:
            self._move(piece, [user, piece], at, source=node)

    def _move(self, user: Node, way: list[Node], at: Reader, source: Node | None = None) -> None:
        if at.affine is not None and self._has_beta(at.affine) and shifts(user):
            self._fault(user, f"changes what {described(at.affine.node)} adds")
            return
        start = source or cast("Node", way[0].args[0])
        # Blocks that a norm weighs each in its own way stay in their order.
        unit = at.affine.size if at.affine is not None else self._stream.width
        inside = Channels(at.channels.dim, at.channels.blocks * self._stream.width // unit)
        found = moved(self._graph_module, way, start, inside, unit)
        blocks = found.blocks * unit // self._stream.width if found is not None else 0
        self._reach(user, found and Channels(found.dim, blocks), at.affine)

    def _combine(self, node: Node, user: Node, channels: Channels) -> None:
        """Follow a value into a sum, a concatenation, a factor that its channels share, or the weights of a norm."""
        shape, of = shape_of(user), shape_of(node)
        whole = is_tensor(user) and shape[channels.dim :][:1] == of[channels.dim :][:1]
        if call_name(user) in ADDITIONS and whole:
            self._reach(user, channels)
        elif call_name(user) == "stack" and is_tensor(user):
            self._reach(user, stacked(user, channels))
        elif call_name(user) in CONCATENATIONS and is_tensor(user):
            if shape[channels.dim] % self._stream.width:
                self._fault(user, "concatenates the stream with other channels")
            else:
                self._reach(user, Channels(channels.dim, shape[channels.dim] // self._stream.width))
        elif user.target in (*MULTIPLICATIONS, *DIVISIONS) and whole and self._is_factor_shared(node, user, channels):
            self._reach(user, channels)
        elif whole and (path := factor_of(user, node, channels)) is not None:
            self._stream.affines[user] = Affine(user, shape[channels.dim], path)
            self._reach(user, channels, self._stream.affines[user])
        else:
            self._fault(user, READS)

    def _is_factor_shared(self, node: Node, user: Node, channels: Channels) -> bool:
        if user.args[0] is not node and user.target not in MULTIPLICATIONS:
            return False
        others = [x for x in user.args[:2] if isinstance(x, Node) and x is not node]
        return user.args[0] is not user.args[1] and all(is_tensor(x) and self._is_shared(x, channels) for x in others)

    def _read(self, node: Node, user: Node, at: Reader) -> None:
        """Note a product that reads a value; with a bias in front of it, a convolution must pad nothing."""
        beta = at.affine is not None and self._has_beta(at.affine)
        if user.args[0] is not node or node in user.args[1:] or not self._has_stored_weights(user, at.channels):
            self._fault(user, _grouped(user) or READS)
        elif beta and kind_of(user) == "conv2d" and user.args[4] not in ((0, 0), "valid"):
            self._fault(user, f"puts zeros beside what {described(cast('Affine', at.affine).node)} adds to")
        elif beta and kind_of(user) == "matmul":
            self._fault(user, f"has no bias for what {described(cast('Affine', at.affine).node)} adds")
        else:
            self._stream.readers[user] = at

    def _has_beta(self, affine: Affine) -> bool:
        return bool(affine.beta) and bool(get_attribute(self._graph_module, affine.beta).any())


def _grouped(node: Node) -> str:
    grouped = kind_of(node) == "conv2d" and node.args[6] != 1
    return "is a convolution in groups of channels" if grouped else ""
