"""Compute once what depends on no input: standardized weights, position encodings, relative position biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ptq4vit_fx.names import join, leaf_of, owner_of
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import is_stored, origin, stored_path
from ptq4vit_fx.passes.graph.marks import kind_of, scope_of
from ptq4vit_fx.passes.graph.rewriter import Writer
from ptq4vit_fx.passes.graph.stages import Stage

#: Name of a weight that was computed from a parameter `weight`.
FOLDED_WEIGHT = "weight_folded"
#: Where a GraphModule keeps the names of the layers that ran on constants and are gone.
FOLDED_LAYERS = "ptq4vit_folded_layers"


@graph_pass(before=Stage.CANONICAL, after=Stage.CANONICAL)
def fold_constants(graph_module: GraphModule) -> int:
    """Replace every value that is computed from parameters alone by a buffer with that value, bit for bit.

    A parameter that is only moved (an expanded class token) stays as it is, unless it is the weight or bias of a
    product: these are attributes. The layers that disappear are listed in the GraphModule's meta.
    """
    values = _constant_values(graph_module)
    frontier = [
        node for node in values if any(user not in values for user in node.users) and _is_worth_it(node, values)
    ]
    for node in frontier:
        target = _register(graph_module, node, values[node])
        constant = Writer(node.next, like=node).attribute(target)
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)
    folded = []
    for node in reversed(list(values)):
        if not node.users and node.op != "get_attr":
            if kind_of(node) is not None and (weight := stored_path(node.args[1])):
                folded.append(owner_of(weight))
            graph_module.graph.erase_node(node)
    graph_module.meta[FOLDED_LAYERS] = tuple(reversed(folded))
    return len(frontier)


def _constant_values(graph_module: GraphModule) -> dict[Node, Any]:
    """Evaluate every node that depends on no placeholder."""
    interpreter = Interpreter(graph_module)
    values = interpreter.env
    with torch.no_grad():
        for node in graph_module.graph.nodes:
            if node.op not in ("placeholder", "output") and all(n in values for n in node.all_input_nodes):
                values[node] = interpreter.run_node(node)
    return values


def _is_worth_it(node: Node, values: dict[Node, Any]) -> bool:
    if node.op == "get_attr" or not isinstance(values[node], Tensor):
        return False
    return _is_multiplied(node) or _is_added(node) or origin(node).op != "get_attr"


def _is_multiplied(node: Node) -> bool:
    """Return whether a product has this value as its right operand, as it has a weight."""
    return any(kind_of(user) is not None and user.args[1] is node for user in node.users)


def _is_added(node: Node) -> bool:
    """Return whether a product has this value as its bias."""
    return any(kind_of(user) is not None and node in user.args[2:3] for user in node.users)


def _register(graph_module: GraphModule, node: Node, value: Tensor) -> str:
    """Hold the value in the module that computed it; return its path."""
    path, leaf = scope_of(node), f"{node.name}_folded"
    weight = next((path for path in map(stored_path, _sources(node)) if leaf_of(path) == "weight"), None)
    if weight is not None and _is_multiplied(node):
        path, leaf = owner_of(weight), FOLDED_WEIGHT
    owner: nn.Module = graph_module
    for name in filter(None, path.split(".")):
        if not isinstance(getattr(owner, name, None), nn.Module):
            owner.add_module(name, nn.Module())
        owner = getattr(owner, name)
    if hasattr(owner, leaf):
        leaf = node.name
    owner.register_buffer(leaf, value.detach().contiguous())
    return join(path, leaf)


def _sources(node: Node) -> list[Node]:
    """Return the parameters that the value is computed from."""
    if is_stored(node):
        return [node]
    return [source for operand in node.all_input_nodes for source in _sources(operand)]
