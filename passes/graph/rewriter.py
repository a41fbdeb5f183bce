"""The chore of replacing a node: insert in front of it, in its scope, hand over its product, name and readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.names import holder, join, leaf_of, owner_of
from ptq4vit_fx.passes.graph.dataflow import stored_path
from ptq4vit_fx.passes.graph.marks import mark_product, planned_product, put_in_scope


class SiteTensors(nn.Module):
    """The integer codes, scale and zero point of one site: buffers only, so that ONNX shows their names."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Writer:
    """Inserts nodes in front of `place`; they get its scopes, or those of `like`, and `scope` as the innermost one."""

    def __init__(self, place: Node, *, like: Node | None = None, scope: str | None = None) -> None:
        self.place, self._like, self._scope = place, like or place, scope

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert a call of a function."""
        return self._insert(self.place.graph.call_function, function, args, kwargs)

    def method(self, name: str, *args: Any) -> Node:
        """Insert a call of a method of the first argument."""
        return self._insert(self.place.graph.call_method, name, args)

    def module(self, path: str, *args: Any) -> Node:
        """Insert a call of a module of the graph."""
        return self._insert(self.place.graph.call_module, path, args)

    def attribute(self, path: str) -> Node:
        """Insert a read of a parameter or buffer."""
        return self._insert(self.place.graph.get_attr, path)

    def hold(self, tensors: dict[str, Tensor]) -> list[Node]:
        """Register tensors in a module named after the writer's scope; return the reads of them."""
        assert self._scope is not None
        owner(self.place).add_submodule(holder(self._scope), SiteTensors(tensors))
        return [self.attribute(join(holder(self._scope), name)) for name in tensors]

    def within(self, scope: str) -> Writer:
        """Return a writer at the same place whose nodes get another innermost scope."""
        return Writer(self.place, like=self._like, scope=scope)

    def _insert(self, make: Callable[..., Node], *call: Any) -> Node:
        with self.place.graph.inserting_before(self.place):
            return put_in_scope(make(*call), self._like, self._scope)


def replace(node: Node, by: Any, *, product: Node | None = None) -> None:
    """Let all readers of a node read `by`, and erase it.

    product: the new node that is the product of the plan now, which gets the name of the old one too.
    """
    name, planned = node.name, planned_product(node)
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
    if product is not None:
        assert planned is not None
        mark_product(product, planned)
        rename(product, name)


def rename(node: Node, name: str) -> None:
    """Give a node another name; torch.fx adds a number where that is taken."""
    node._rename(name)


def owner(node: Node) -> GraphModule:
    """Return the GraphModule that a node belongs to."""
    graph_module = node.graph.owning_module
    assert graph_module is not None
    return graph_module


def drop_stored(node: Node) -> None:
    """Remove a get_attr node that nobody uses, and its tensor unless another node reads it."""
    path = stored_path(node)
    if not node.users:
        graph_module = owner(node)
        graph_module.graph.erase_node(node)
        if not any(stored_path(other) == path for other in graph_module.graph.nodes):
            delattr(graph_module.get_submodule(owner_of(path)), leaf_of(path))
