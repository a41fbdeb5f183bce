"""Tensors that a graph reads under paths: who reads them, and how a changed one takes the place of another."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.names import join, leaf_of, owner_of
from ptq4vit_fx.passes.graph.dataflow import get_attribute


def reads_of(graph_module: GraphModule, tensor: Tensor) -> list[Node]:
    """Return the nodes that read a tensor, under whichever path, or call a module that holds it."""
    return [node for node in graph_module.graph.nodes if _reads(graph_module, node, tensor)]


def _reads(graph_module: GraphModule, node: Node, tensor: Tensor) -> bool:
    if node.op == "get_attr":
        return get_attribute(graph_module, str(node.target)) is tensor
    if node.op != "call_module":
        return False
    module = graph_module.get_submodule(str(node.target))
    return any(x is tensor for x in (*module.parameters(), *module.buffers()))


def are_alone(reads: Iterable[Node], readers: Collection[Node]) -> bool:
    """Return whether a tensor with these reads comes to no other node than `readers`."""
    return all(read.op == "get_attr" and all(user in readers for user in read.users) for read in reads)


def overwrite(graph_module: GraphModule, reads: list[Node], value: Tensor) -> None:
    """Hold another value, in the type of the old one, under all paths that these nodes read."""
    made: Tensor | None = None
    for path in dict.fromkeys(str(node.target) for node in reads):
        owner, leaf = graph_module.get_submodule(owner_of(path)), leaf_of(path)
        old = get_attribute(graph_module, path)
        if made is None:
            made = _like(old, value)
        if leaf in owner._buffers:
            owner._buffers[leaf] = made
        else:
            setattr(owner, leaf, made)


def hold(graph_module: GraphModule, like: str, leaf: str, value: Tensor) -> str:
    """Hold a further tensor beside the one at the path `like`, in its type; return its path."""
    path, number = owner_of(like), 0
    owner = graph_module.get_submodule(path)
    while getattr(owner, name := f"{leaf}_{number}" if number else leaf, None) is not None:
        number += 1
    made = _like(get_attribute(graph_module, like), value)
    if name in owner._parameters:  # a bias that is None
        owner._parameters[name] = nn.Parameter(made.detach(), requires_grad=False)
    else:
        owner.register_buffer(name, made.detach())
    return join(path, name)


def _like(old: Tensor, value: Tensor) -> Tensor:
    made = value.to(old).contiguous()
    return nn.Parameter(made, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else made
