"""Channels that may be scaled: which of them go together, which layers write and which products read them.

Every channel that a layer with stored weights writes is a class of its own. The graph itself moves the numbers of the
classes, as it moves the values, through whatever a positive factor passes: ReLU, pools, averages, stored factors. Where
two values are added, their classes become one. What reads a value in any other way fixes its classes: they have the
factor 1, for the reason that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ptq4vit_fx.passes.graph.activations import MULTIPLICATIONS
from ptq4vit_fx.passes.graph.affine_norms import affine_dimension
from ptq4vit_fx.passes.graph.channel_places import CASTS, FLATTENING, SHAPED_LIKE, SUMS, averaged_dimensions
from ptq4vit_fx.passes.graph.channels import Groups, is_observer
from ptq4vit_fx.passes.graph.dataflow import call_name, is_stored, moves_only
from ptq4vit_fx.passes.graph.marks import kind_of
from ptq4vit_fx.passes.graph.residual_streams import CONCATENATIONS, DIVISIONS
from ptq4vit_fx.passes.graph.shapes import dtype_of, example_of, is_tensor, shape_of
from ptq4vit_fx.passes.graph.streams import ADDITIONS, described, reads_shape

#: The class of what padding puts beside values, which any factor leaves as it is; that of what has the factor 1.
FREE, FIXED = 0, 1
#: f(a x) = a f(x) for every a > 0, element by element: not ReLU6, whose bound stays where it is.
HOMOGENEOUS = ("relu", "leaky_relu", "prelu", "neg")
HOMOGENEOUS_MODULES = (nn.LeakyReLU, nn.PReLU)
#: The same over the places of a channel, the last two dimensions.
POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate")
POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)


@dataclass
class ChannelClasses:
    """What was found: int64 numbers of classes, a class being named by any of its numbers until `roots` is asked.

    written: layer -> the class of each channel that it gives. read: product -> that of each channel of its input.
    """

    written: dict[Node, Tensor] = field(default_factory=dict)
    read: dict[Node, Tensor] = field(default_factory=dict)
    groups: Groups = field(default_factory=Groups)
    count: int = FIXED + 1
    reasons: dict[float, str] = field(default_factory=dict)

    def new(self, channels: int) -> Tensor:
        """Return the numbers of new classes, float64 (channels,)."""
        first, self.count = self.count, self.count + channels
        return torch.arange(first, self.count, dtype=torch.float64)

    def reason(self, number: int) -> str:
        """Return why a number is fixed, "" if it is not, or is that of what no layer writes."""
        return next((self.reasons[own] for own in self.groups.path(number) if own in self.reasons), "")

    def roots(self, numbers: Tensor) -> Tensor:
        """Return the number that all of a class share, of every number, int64: FIXED if it has the factor 1."""
        return self.groups.firsts(numbers.long())

    def join(self, ours: Tensor, theirs: Tensor, reason: str) -> None:
        """Make pairs of numbers one class; reason: why it is fixed if one of the two is."""
        known = (ours != FREE) & (theirs != FREE)
        for low, high in self.groups.join(ours[known], theirs[known]):
            if low == FIXED:
                self.reasons[high] = reason

    def fix(self, numbers: Tensor, reason: str) -> None:
        """Give classes the factor 1."""
        self.join(numbers, torch.full_like(numbers, FIXED), reason)


def channel_classes(graph_module: GraphModule) -> ChannelClasses:
    """Return the classes of the channels of a canonical graph with shapes, with observers or without."""
    search = _Search(graph_module)
    for node in graph_module.graph.nodes:
        search.visit(node)
    return search.classes


class _Search:
    def __init__(self, graph_module: GraphModule) -> None:
        self.classes = ChannelClasses()
        self._graph_module = graph_module
        self._interpreter = Interpreter(graph_module)
        self._numbers: dict[Node, Any] = {}

    def visit(self, node: Node) -> None:
        """Number the channels of a node, and drop what nobody behind it reads."""
        numbers = self._visited(node)
        if numbers is not None:
            self._numbers[node] = numbers
        for last in self._interpreter.user_to_last_uses.get(node, []):
            self._numbers.pop(last, None)

    def _visited(self, node: Node) -> Any:
        if is_observer(self._graph_module, node):
            return self._numbers.get(cast("Node", node.args[3]))
        numbered = [x for x in node.all_input_nodes if x in self._numbers and not reads_shape(node, x)]
        dim = affine_dimension(self._graph_module, node)
        if kind_of(node) is not None:
            self._read(node, numbered)
            dim = _rows_of(node)
        elif dim is not None or not numbered:
            self._fix(node, numbered)
        elif (moved := self._moved(node, numbered)) is not None:
            return moved
        else:
            self._fix(node, numbered)
        return None if dim is None else self._write(node, dim)

    def _fix(self, node: Node, numbered: list[Node]) -> None:
        reason = "the model returns it" if node.op == "output" else f"{described(node)} reads it"
        for value in numbered:
            numbers = self._numbers[value]
            for part in numbers if isinstance(numbers, (tuple, list)) else (numbers,):
                self.classes.fix(_compact(part)[0], reason)

    def _write(self, node: Node, dim: int) -> Tensor:
        shape = shape_of(node)
        new = self.classes.new(shape[dim])
        self.classes.written[node] = new.long()
        return new.view(-1, *[1] * (-dim - 1)).expand(shape)

    def _read(self, node: Node, numbered: list[Node]) -> None:
        """Note which classes a product reads along its columns; whatever else reads them fixes them."""
        lhs, weight = cast("Node", node.args[0]), node.args[1]
        takes_back = is_stored(weight) and (kind_of(node) != "matmul" or len(shape_of(weight)) == 2)
        if takes_back and numbered == [lhs]:
            numbers = _along(self._numbers[lhs], -3 if kind_of(node) == "conv2d" else -1)
            if numbers is not None:
                self.classes.read[node] = numbers.long()
                return
        self._fix(node, numbered)

    def _moved(self, node: Node, numbered: list[Node]) -> Any:
        """Return the numbers behind a node that a positive factor passes, None if it passes none."""
        name, first = call_name(node), node.args[0] if node.args else None
        module = self._graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if name in CONCATENATIONS or name == "stack":
            return self._run(node)
        if name in ADDITIONS:
            return self._added(node) if len(node.args) > 1 else None
        if node.target in MULTIPLICATIONS or node.target in DIVISIONS:
            return None if node.kwargs else self._multiplied(node, numbered)
        if numbered != [first]:
            return None
        numbers = self._numbers[cast("Node", first)]
        if name in HOMOGENEOUS or type(module) in HOMOGENEOUS_MODULES or _keeps(node):
            return numbers
        if (name in POOLS or type(module) in POOL_MODULES) and is_tensor(node):
            places = _reduced(numbers, (-2, -1)) if numbers.ndim > 2 else None
            return None if places is None else places.expand(shape_of(node))
        if name in SUMS:
            return _averaged(node, numbers)
        known = _places_are_known(node) and (moves_only(node) or _pads_with_zeros(node))
        return self._run(node) if known or type(module) in FLATTENING else None

    def _run(self, node: Node) -> Any:
        """Return what a move makes of numbers; what has none is fixed."""
        for operand in node.all_input_nodes:
            value = self._numbers.get(operand)
            if value is None:
                joined = call_name(node) in (*CONCATENATIONS, "stack") and is_tensor(operand)
                value = self._fixed(operand) if joined else example_of(self._graph_module, operand)
            self._interpreter.env[operand] = value.cpu() if isinstance(value, Tensor) else value
        with torch.inference_mode():
            moved = self._interpreter.run_node(node)
        self._interpreter.env.clear()
        return moved

    def _fixed(self, node: Node) -> Tensor:
        return torch.full(shape_of(node), FIXED, dtype=torch.float64)

    def _added(self, node: Node) -> Tensor:
        terms = []
        for term in node.args[:2]:
            numbers = self._numbers.get(term) if isinstance(term, Node) else None
            if numbers is None:
                zero = isinstance(term, (int, float)) and term == 0
                numbers = torch.full((1,), FREE if zero else FIXED, dtype=torch.float64)
            terms.append(numbers.expand(shape_of(node)))
        ours, theirs = _compact(*terms)
        self.classes.join(ours, theirs, f"{described(node)} adds something else to it")
        return torch.where(ours == FREE, theirs, ours).expand(shape_of(node))

    def _multiplied(self, node: Node, numbered: list[Node]) -> Tensor | None:
        """Follow one factor; of two that have numbers the second one is fixed."""
        factors = [x for x in node.args[:2] if x in numbered]
        if len(factors) != len(numbered) or (node.target in DIVISIONS and node.args[1] in numbered):
            return None
        for other in numbered[1:]:
            self._fix(node, [other])
        numbers: Tensor = self._numbers[numbered[0]]
        return numbers.expand(shape_of(node))


def _rows_of(node: Node) -> int | None:
    """Return along which dimension a product writes channels that are rows of a stored weight, None if it does not."""
    if kind_of(node) == "matmul" or not is_stored(node.args[1]):
        return None
    bias_is_stored = node.args[2] is None or is_stored(node.args[2])
    return (-3 if kind_of(node) == "conv2d" else -1) if bias_is_stored else None


def _keeps(node: Node) -> bool:
    """Return whether a node casts a value to the type that it has."""
    return call_name(node) in CASTS and dtype_of(node) is dtype_of(cast("Node", node.args[0]))


def _places_are_known(node: Node) -> bool:
    """Return whether it does not depend on the input which places a node takes."""
    others = [x for x in node.all_input_nodes if is_tensor(x) and x is not node.args[0] and not is_stored(x)]
    return not others or call_name(node) in SHAPED_LIKE


def _pads_with_zeros(node: Node) -> bool:
    if call_name(node) != "pad":
        return False
    mode, value = (*node.args[2:], None, None)[:2]
    mode, value = node.kwargs.get("mode", mode), node.kwargs.get("value", value)
    return mode not in (None, "constant") or value in (None, 0)


def _averaged(node: Node, numbers: Tensor) -> Tensor | None:
    dims = averaged_dimensions(node)
    reduced = None if dims is None else _reduced(numbers, dims)
    if reduced is not None and dims is not None and len(shape_of(node)) < reduced.ndim:
        reduced = reduced.squeeze(tuple(dims))
    return None if reduced is None else reduced.expand(shape_of(node))


def _along(numbers: Tensor, dim: int) -> Tensor | None:
    """Return the number of each entry along a dimension, None if it depends on the other ones."""
    reduced = _reduced(numbers, [other for other in range(-numbers.ndim, 0) if other != dim])
    return None if reduced is None else reduced.flatten().expand(numbers.shape[dim])


def _reduced(numbers: Tensor, dims: Any) -> Tensor | None:
    """Return the one number over some dimensions, which stay with a size of 1; None if there are several."""
    (numbers,) = _compact(numbers)
    kept = numbers.amax(tuple(dims), keepdim=True) if len(dims) else numbers
    return kept if bool(((numbers == kept) | (numbers == FREE)).all()) else None


def _compact(*numbers: Tensor) -> list[Tensor]:
    """Return tensors of one shape without the dimensions along which all of them repeat one entry: of a size of 1."""
    repeated = [dim for dim in range(numbers[0].ndim) if all(x.stride(dim) == 0 for x in numbers)]
    for dim in repeated:
        numbers = tuple(x.narrow(dim, 0, 1) for x in numbers)
    return list(numbers)
