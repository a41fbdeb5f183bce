"""Trace through torch.export, and make of its program the same kind of graph that torch.fx's tracer gives."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ptq4vit_fx.errors import warn
from ptq4vit_fx.names import leaf_of, owner_of
from ptq4vit_fx.passes.graph.dataflow import overwrites
from ptq4vit_fx.passes.graph.marks import NO_MODULE
from ptq4vit_fx.passes.graph.model_call import ModelCall, call_of, name_inputs
from ptq4vit_fx.passes.graph.own_names import traced_module
from ptq4vit_fx.passes.graph.silence import silence
from ptq4vit_fx.torch_state import without_fast_attention


class _Called(nn.Module):
    """A root around the model, so that its own hooks and its replaced forward run as those of any other module."""

    def __init__(self, root: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.root, self.call = root, call

    def forward(self, *tensors: Tensor) -> Any:
        return self.call(self.root, *tensors)


#: Where a traced GraphModule notes the largest batch that it holds for, if there is one.
LARGEST_BATCH = "ptq4vit_largest_batch"
#: What `_Called` puts in front of every path.
ROOT = "root"


def trace_by_export(
    root: nn.Module,
    example_inputs: Sequence[Tensor],
    call: ModelCall | None = None,
    *,
    batch: Any = None,
    fixed: bool = False,
) -> GraphModule:
    """Return a graph of `root` over aten operators, its parameters under their own paths, its batch dynamic.

    example_inputs: of any batch size; two images are exported, because torch.export takes a size of 1 for a constant.
    call: how the model is called, by default on its first parameters. batch: what torch.export is told of the batch
    size, by default that it may be any. fixed: the batch stays that of the example. Raises what torch.export raises.
    """
    call = call or call_of(root, len(example_inputs))
    device = next((p.device for p in root.parameters()), example_inputs[0].device)
    images = tuple(x.detach().to(device) for x in example_inputs)
    if not fixed:
        images = tuple(x[:1].expand(2, *x.shape[1:]).contiguous() for x in images)
    dynamic = None if fixed else ({0: batch or torch.export.Dim("batch", min=1)},) * len(images)
    with without_fast_attention(), silence(), torch.no_grad():
        program = torch.export.export(_Called(root, call), images, dynamic_shapes=dynamic and (dynamic,), strict=False)
    _hold_constants(root, program)
    graph = _plain_graph(program, call.names)
    name_inputs(graph, call.names)
    graph_module = traced_module(root, graph, type(root).__name__)
    largest = [int(r.upper) for r in program.range_constraints.values() if batch is not None and r.upper.is_Integer]
    if largest:
        graph_module.meta[LARGEST_BATCH] = min(largest)
    return graph_module


def warn_of_largest_batch(largest: int) -> None:
    """Say that a graph holds for some batch sizes only (PTQWarning)."""
    message = f"the model computes otherwise on more than {largest} images at once: the traced graph holds up to there"
    warn(message)


def _own(path: str) -> str:
    """Return a path of the exported program as the model has it."""
    return path.removeprefix(ROOT).removeprefix(".")


def _hold_constants(root: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Make sure that every tensor the program reads is an attribute of the root: constants of a forward are not."""
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.CONSTANT_TENSOR:
            continue
        value, path = program.constants[str(spec.target)], _own(str(spec.target))
        owner, leaf = root.get_submodule(owner_of(path)), leaf_of(path)
        if not isinstance(getattr(owner, leaf, None), Tensor):
            owner.register_buffer(leaf, value, persistent=False)


def _plain_graph(program: torch.export.ExportedProgram, names: Sequence[str]) -> Graph:
    """Return the program's graph with get_attr nodes for its parameters, inlined regions and the model's own output."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    graph, made, inputs = Graph(), {}, iter(names)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            made[node] = (
                graph.placeholder(next(inputs))
                if spec.kind is InputKind.USER_INPUT
                else graph.get_attr(_own(str(spec.target)))
            )
        elif node.op != "output":
            _copy(graph, program.graph_module, node, made)
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    (results,) = next(node for node in program.graph.nodes if node.op == "output").args
    outputs = [r for r, kind in zip(results, kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
    leaves = [made[r] if isinstance(r, Node) else r for r in outputs]
    graph.output(pytree.tree_unflatten(leaves, program.call_spec.out_spec))
    return graph


def _copy(graph: Graph, owner: GraphModule, node: Node, made: dict[Node, Any]) -> None:
    """Append a copy of `node`; an operator that only wraps a region (no_grad, autocast off) becomes the region."""
    if node.op == "get_attr" and isinstance(getattr(owner, str(node.target), None), GraphModule):
        return  # a region, read where it is called
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        position, region = next((i, a) for i, a in enumerate(node.args) if isinstance(a, Node) and a not in made)
        operands = [made[a] if isinstance(a, Node) else a for a in node.args[position + 1 :]]
        made[node] = _inline(graph, getattr(owner, str(region.target)), operands)
    elif node.target is operator.getitem and isinstance(made[node.args[0]], (tuple, list)):  # type: ignore[index]
        made[node] = made[node.args[0]][node.args[1]]  # type: ignore[index]
    elif node.users or overwrites(node):  # what nobody reads is an assertion
        made[node] = graph.node_copy(node, lambda n: made[n])
        made[node].meta = {"nn_module_stack": _stack(node), "stack_trace": node.meta.get("stack_trace")}


def _stack(node: Node) -> dict[str, tuple[str, Any]]:
    """Return the module stack as torch.fx's tracer writes it: path -> (path, type)."""
    stack = node.meta.get("nn_module_stack", {})
    own = [(_own(path), kind) for path, kind in stack.values()]
    return {path: (path, kind) for path, kind in own if path and path != NO_MODULE}


def _inline(graph: Graph, region: GraphModule, operands: list[Any]) -> Any:
    """Append the nodes of a region; return its outputs."""
    placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
    made: dict[Node, Any] = dict(zip(placeholders, operands, strict=True))
    for node in region.graph.nodes:
        if node.op not in ("placeholder", "output"):
            _copy(graph, region, node, made)
    (outputs,) = next(node for node in region.graph.nodes if node.op == "output").args
    return map_arg(outputs, lambda n: made[n])
