"""The inputs and outputs of a file: their names, and outputs in the form that every runtime takes."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
from torch.fx import GraphModule, Node

from ptq4vit_fx import names
from ptq4vit_fx.errors import failure, warn
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.contract import rewrite
from ptq4vit_fx.passes.graph.outputs import Path, leaves, named
from ptq4vit_fx.passes.graph.rewriter import Writer
from ptq4vit_fx.passes.graph.shapes import RESULT, Shape

#: What the one input is called, and the first dimension of every input.
IMAGE, BATCH = "image", "batch"


@dataclass(frozen=True)
class Interface:
    """The names of a file's inputs, and of its outputs: the model's own name of each -> the file's."""

    inputs: tuple[str, ...]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Result:
    """A value that a graph returns: what a node gives, or the item of it at these positions and keys; and its shape."""

    node: Any
    path: Path
    value: Any


def interface_of(
    converted: GraphModule, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None
) -> Interface:
    """Return the interface of a converted model's file: with the names that were chosen, or the usual ones.

    outputs: names of the model's own, which are then the file's outputs in that order; or a new name for each.
    Raises PTQError if names are too few, too many, empty or the same, and on complex outputs; warns of numbers that a
    model returns.
    """
    parameters = [node.name for node in converted.graph.nodes if node.op == "placeholder"]
    taken = _chosen("input_names", inputs, parameters if len(parameters) > 1 else [IMAGE])
    results = results_of(converted, say=outputs is None)
    own = list(results)
    if not own:
        do = "return a tensor from forward"
        raise failure("export_onnx", "the model's output", expected="a tensor at least", got="none", do=do)
    if outputs is not None and not isinstance(outputs, str) and outputs and set(outputs) <= set(own):
        own, given = list(outputs), list(outputs)
    else:
        usual = [names.variant(name, "output") if name in taken else name for name in own]
        given = _chosen("output_names", outputs, usual)
        if moved := [name for name, mine in zip(given, own, strict=True) if name in own and name != mine]:
            do = f"choose among {', '.join(own)}, or give each of them a new name, in this order"
            got = f"{', '.join(given)}, of which {moved[0]} is another one's own name"
            raise failure("export_onnx", "output_names", expected="names of the model's, or new ones", got=got, do=do)
    for name in own:
        _check_real(name, results[name])
    every = [*taken, *given]
    if len(set(every)) < len(every):
        do = "rename one of them"
        raise failure("export_onnx", "names", expected="names that differ", got=", ".join(every), do=do)
    return Interface(tuple(taken), dict(zip(own, given, strict=True)))


def _check_real(name: str, result: Result) -> None:
    """Raise PTQError on a complex output: ONNX has none, and the exporter writes real tensors of another size."""
    if result.value.dtype.is_complex:
        do = "return torch.view_as_real(x), or x.abs(), from forward, or leave it out with output_names="
        got = str(result.value.dtype)
        raise failure("export_onnx", f"output {name}", expected="real numbers, as ONNX has them", got=got, do=do)


def _chosen(argument: str, given: Sequence[str] | None, usual: list[str]) -> list[str]:
    chosen = usual if given is None else [given] if isinstance(given, str) else list(given)
    if len(chosen) != len(usual) or not all(isinstance(name, str) and name for name in chosen):
        count = "one name" if len(usual) == 1 else f"{len(usual)} names"
        some = ", or some of these" if argument == "output_names" and len(usual) > 1 else ""
        expected = f"{count}, as {', '.join(usual)}{some}"
        raise failure("export_onnx", argument, expected=expected, got=repr(given), do="name each of them")
    return chosen


def results_of(graph_module: GraphModule, *, say: bool = False) -> dict[str, Result]:
    """Return name -> tensor that a graph returns; say: warn (PTQWarning) of numbers, which no ONNX file returns."""
    found: list[tuple[Path, Result]] = []
    for path, leaf in leaves(next(node.args[0] for node in graph_module.graph.nodes if node.op == "output")):
        values = leaf.meta.get(RESULT) if isinstance(leaf, Node) else leaf
        # A call may return several tensors, as x.topk(3) does.
        found += [((*path, *inner), Result(leaf, inner, value)) for inner, value in leaves(values)]
    numbers = named(found, lambda result: isinstance(result.value, (bool, int, float, str)))
    if numbers and say:
        text = ", ".join(f"{name} ({result.value!r})" for name, result in numbers.items())
        warn(f"not in the file, which holds tensors alone: {text}")
    return named(found, lambda result: isinstance(result.value, Shape))


def return_results(graph_module: GraphModule, own: Sequence[str]) -> GraphModule:
    """Let a graph return these of its tensors, in place, one behind the other; return it."""
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    results, write = results_of(graph_module), Writer(output)

    def item(result: Result) -> Node:
        node, value = cast("Node", result.node), result.node.meta[RESULT]
        for step in result.path:
            read: Any = getattr if isinstance(step, str) and isinstance(value, tuple) else operator.getitem
            node, value = write(read, node, step), read(value, step)  # getattr: of a named tuple
        return node

    output.args = (tuple(item(results[name]) for name in own),)
    graph_module.recompile()
    return graph_module


def working_names(interface: Interface) -> tuple[list[str], list[str]]:
    """Return names for the exporter, which no parameter and no layer has: it does not look whether a name is free."""
    counts = {"input": len(interface.inputs), "output": len(interface.outputs)}
    mine = {kind: [f"ptq4vit_{kind}_{number}" for number in range(count)] for kind, count in counts.items()}
    return mine["input"], mine["output"]


@rewrite(nothing="every output is the result of a node")
def compute_outputs(model: ir.Model) -> int:
    """Let a node make every output, in place: runtimes refuse a constant that is returned as it is."""
    constants = [value for value in model.graph.outputs if nodes.is_constant(value)]
    for value in dict.fromkeys(constants):
        name = nodes.name_of(value)
        value.name = names.variant(name, "constant")
        copy = nodes.new_node("Identity", [value], name, names.node(name, "Identity"))
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        model.graph.append(copy)
        for number, output in enumerate(model.graph.outputs):
            if output is value:
                model.graph.outputs[number] = copy.outputs[0]
    return len(constants)


@rewrite(nothing="a file has an input")
def name_interface(model: ir.Model, interface: Interface) -> int:
    """Name inputs and outputs, in place, and the batch `batch`; what else has one of these names gets another."""
    graph = model.graph
    made = [value for node in graph for value in node.outputs]
    chosen = dict(zip([*graph.inputs, *graph.outputs], [*interface.inputs, *interface.outputs.values()], strict=True))
    wanted = set(chosen.values())
    values = [*graph.inputs, *graph.initializers.values(), *made]
    for value in values:
        if value.name in wanted and value not in chosen:
            value.name = names.variant(nodes.name_of(value), "inner")
    for value, name in chosen.items():
        value.name = name
    _name_batch(model, values)
    return len(chosen)


def _name_batch(model: ir.Model, values: list[ir.Value]) -> None:
    """Call the first dimension of the inputs `batch` in every shape, also where it is a factor."""
    first = model.graph.inputs[0].shape
    dynamic = first[0].value if first is not None and isinstance(first[0], ir.SymbolicDim) else None
    if dynamic is None:
        return
    pattern = re.compile(rf"\b{re.escape(dynamic)}\b")
    for value in values:
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else size.value for size in value.shape]
            value.shape = ir.Shape(pattern.sub(BATCH, size) if isinstance(size, str) else size for size in sizes)
