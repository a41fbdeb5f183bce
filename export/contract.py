"""The contract of ONNX rewrites: a named step changes a model in place, leaves it legal, and says what it did.

A step is a function `(model, ...) -> int` that returns how many places it rewrote. `@rewrite` makes a `Step` of it:
after the function, whatever nobody reads any more is removed, the model is checked, and the count is recorded, or the
sentence that says why there was nothing to do. A step never copies: who wants the model as it was calls
`model.clone()` first (tensors are shared, nodes are not).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ptq4vit_fx.errors import failure


@dataclass(frozen=True)
class Rewrite:
    """What one step did: how many places it rewrote, and why if there was none."""

    name: str
    count: int
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.count} rewritten" if self.count else f"{self.name}: nothing, {self.reason}"


@dataclass(frozen=True)
class Step:
    """A rewrite under its contract. nothing: why a model may have no place for it, a sentence for the user."""

    name: str
    nothing: str
    function: Callable[..., int]

    @property
    def needs(self) -> tuple[str, ...]:
        """What the step wants to know beside the model, by the names of its parameters: `plan`, `opset`."""
        return tuple(inspect.signature(self.function).parameters)[1:]

    def __call__(self, model: ir.Model, *known: Any) -> Rewrite:
        """Rewrite a model in place. Raises PTQError if the step left it illegal, or refuses it."""
        repeated = _repeated(model)  # of another program's file, which is its own matter
        count = self.function(model, *known)
        if count:
            RemoveUnusedNodesPass()(model)
        check_legal(model, self.name, repeated)
        return Rewrite(self.name, count, "" if count else self.nothing)


#: The first opset with tensors of 4 bits.
INT4_OPSET = 21


@dataclass(frozen=True)
class Target:
    """A runtime: the steps that make the file that it wants, in their order, and a check that raises PTQError.

    activation_bits: of the grids of activations that it holds. twins: whether two branches may stand behind a softmax.
    packed_bits: weights of so many bits or fewer take half a byte in its files, 0 if none do. measured: whether ONNX
    Runtime on this machine is what runs its files, so that their products can be timed here. weights_alone: whether
    weights may be quantized beside float activations.
    """

    name: str
    steps: tuple[Step, ...]
    check: Callable[[ir.Model], object]
    activation_bits: tuple[int, ...] = tuple(range(2, 9))
    twins: bool = True
    packed_bits: int = 0
    measured: bool = False
    weights_alone: bool = False

    def packed(self, opset: int) -> int:
        """Return of how many bits a weight may be that takes half a byte in a file of that opset, 0 if none does."""
        return self.packed_bits if opset >= INT4_OPSET else 0


def check_weights_alone(target: Target, asked: str, operation: str) -> None:
    """Raise PTQError if a target does not hold quantized weights beside float activations; asked: what asks for them.

    ONNX Runtime on CPUs quantizes such activations itself, unless a session says otherwise (traps.py).
    """
    if not target.weights_alone:
        expected, do = "quantized activations beside quantized weights", "use the target generic, or 8 bits"
        raise failure(operation, f"target {target.name}", expected=expected, got=asked, do=do)


def rewrite(*, nothing: str) -> Callable[[Callable[..., int]], Step]:
    """Make a step of a function that rewrites a model in place and returns how many places it rewrote."""
    return lambda function: Step(function.__name__, nothing, function)


def run_steps(model: ir.Model, steps: Sequence[Step], **known: Any) -> tuple[Rewrite, ...]:
    """Run steps one after the other, in place, and return what each did. known: what steps may need, by name."""
    return tuple(step(model, *(known[name] for name in step.needs)) for step in steps)


def check_legal(model: ir.Model, step: str, repeated: Set[str] = frozenset()) -> None:
    """Raise PTQError that names the step and the node unless the graph of a model is whole.

    Every value that is read is given, a constant, or made by a node in front; names of values and of nodes differ;
    every recorded reader is a node of the model that does read; a constant has the type and shape of its tensor.
    Graphs inside of nodes (If, Loop) are the exporter's: no step writes any, and only their reading is looked at.
    repeated: names that several nodes have had before.
    """
    for problem in (*_problems(model), *(f"the name {name} twice" for name in sorted(_repeated(model) - repeated))):
        do = "report this as a bug"
        raise failure("export_onnx", f"step {step}", expected="a legal graph", got=problem, do=do)


def _repeated(model: ir.Model) -> Set[str]:
    names = Counter(node.name or "" for node in model.graph)
    return {name for name, count in names.items() if count > 1}


def _problems(model: ir.Model) -> Iterator[str]:
    graph, graphs = model.graph, set(model.graphs())
    made = dict.fromkeys((*graph.inputs, *graph.initializers.values()))
    for constant in graph.initializers.values():
        tensor = constant.const_value
        if tensor is None or constant.dtype != tensor.dtype or constant.shape != tensor.shape:
            yield f"constant {constant.name} without a tensor of its type"
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in made:
                yield f"{value.name}, which node {node.name} reads and no node in front makes"
        made.update(dict.fromkeys(node.outputs))
    for name, count in Counter(value.name for value in made if value.name).items():
        if count > 1:
            yield f"the tensor {name} twice"
    for value in made:
        for reader, index in value.uses():
            if reader.graph not in graphs or reader.inputs[index] is not value:
                yield f"{value.name}, whose reader {reader.name} is not in the graph"
    for output in graph.outputs:
        if output not in made:
            yield f"output {output.name}, which no node makes"
