"""Trace through torch.export, and make of its program the same kind of graph that torch.fx's tracer gives."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ptq4vit_fx.errors import PTQWarning
from ptq4vit_fx.names import leaf_of, owner_of
from ptq4vit_fx.passes.graph.dataflow import overwrites
from ptq4vit_fx.passes.graph.shapes import without_fast_attention


def trace_by_export(root: nn.Module, example_inputs: Sequence[Tensor]) -> GraphModule:
    """Return a graph of `root` over aten operators, its parameters under their own paths, its batch dynamic.

    example_inputs: of any batch size; two images are exported, because torch.export takes a size of 1 for a constant.
    Raises whatever torch.export raises.
    """
    device = next((p.device for p in root.parameters()), example_inputs[0].device)
    batches = tuple(x.detach()[:1].expand(2, *x.shape[1:]).contiguous().to(device) for x in example_inputs)
    batch = torch.export.Dim("batch", min=1)
    with without_fast_attention(), warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter(
            "always"
        )  # and what torch says is dropped: of tensors that the copy caches in its forward
        program = torch.export.export(root, batches, dynamic_shapes=tuple({0: batch} for _ in batches), strict=False)
    for text in dict.fromkeys(str(item.message) for item in said if issubclass(item.category, PTQWarning)):
        warnings.warn(text, PTQWarning, stacklevel=2)
    _hold_constants(root, program)
    return GraphModule(root, _plain_graph(program), class_name=type(root).__name__)


def _hold_constants(root: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Make sure that every tensor the program reads is an attribute of the root: constants of a forward are not."""
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.CONSTANT_TENSOR:
            continue
        value = program.constants[str(spec.target)]
        owner, leaf = root.get_submodule(owner_of(str(spec.target))), leaf_of(str(spec.target))
        if not isinstance(getattr(owner, leaf, None), Tensor):
            owner.register_buffer(leaf, value, persistent=False)


def _plain_graph(program: torch.export.ExportedProgram) -> Graph:
    """Return the program's graph with get_attr nodes for its parameters, inlined regions and the model's own output."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    graph, made = Graph(), {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            made[node] = (
                graph.placeholder(node.name) if spec.kind is InputKind.USER_INPUT else graph.get_attr(str(spec.target))
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
        made[node].meta = {"nn_module_stack": _stack(node)}


def _stack(node: Node) -> dict[str, tuple[str, Any]]:
    """Return the module stack as torch.fx's tracer writes it: path -> (path, type)."""
    stack = node.meta.get("nn_module_stack", {})
    return {path: (path, kind) for path, kind in stack.values() if path and not path.startswith("_empty")}


def _inline(graph: Graph, region: GraphModule, operands: list[Any]) -> Any:
    """Append the nodes of a region; return its outputs."""
    placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
    made: dict[Node, Any] = dict(zip(placeholders, operands, strict=True))
    for node in region.graph.nodes:
        if node.op not in ("placeholder", "output"):
            _copy(graph, region, node, made)
    (outputs,) = next(node for node in region.graph.nodes if node.op == "output").args
    return map_arg(outputs, lambda n: made[n])
