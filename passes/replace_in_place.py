"""Write operations that change a tensor in place as operations that return a new one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.from_aten import SAME_ARGUMENTS
from ptq4vit_fx.passes.graph.activations import SPELLINGS
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import may_be_view, memory_of, overwrites
from ptq4vit_fx.passes.graph.opaque import is_foreign
from ptq4vit_fx.passes.graph.rewriter import Writer
from ptq4vit_fx.passes.graph.shapes import WRITTEN
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.CANONICAL, after=Stage.CANONICAL)
def replace_in_place(graph_module: GraphModule) -> int:
    """Replace F.relu(x, inplace=True), x.add_(y) and their like by the pure forms.

    Calibration keeps operands until the search: a call that changes them later would change what is searched. All that
    reads x afterwards reads the result. Where another view of the same memory is read afterwards, the call is left
    alone, and so are writes into a part (copy_, setitem). If one of these writes into what the caller gives, all of the
    graph reads a copy of it: whoever runs the graph keeps his images.
    """
    order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    count = 0
    for node in list(graph_module.graph.nodes):
        changed = _changed_argument(node)
        if changed is None or _has_other_views(node, changed, order):
            continue
        _make_pure(node)
        for user in [user for user in changed.users if order[user] > order[node]]:
            user.replace_input_with(changed, node)
        count += 1
    return count + _copy_written_inputs(graph_module)


def _copy_written_inputs(graph_module: GraphModule) -> int:
    """Put a clone behind every input that the graph still writes into; return how many."""
    nodes = list(graph_module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    written = [node for node in inputs if node.meta.get(WRITTEN)]
    if not written or not any(_may_write(node) for node in nodes):
        return 0
    for node in written:
        readers = list(node.users)
        copy = Writer(inputs[-1].next)(torch.clone, node)
        for reader in readers:
            reader.replace_input_with(node, copy)
    return len(written)


def _may_write(node: Node) -> bool:
    """Return whether a call changes what it is given, as far as its name tells; of closed code nothing is known."""
    return overwrites(node) or node.kwargs.get("out") is not None or node.op == "call_module" or is_foreign(node.target)


def _changed_argument(node: Node) -> Node | None:
    """Return the node whose value this call overwrites, None if it overwrites none or has no pure form."""
    first = node.args[0] if node.args else None
    if not isinstance(first, Node) or not overwrites(node):
        return None
    return first if "inplace" in node.kwargs or _pure(node) is not None else None


def _pure(node: Node) -> Any:
    """Return the function, method or operator that computes what this one writes into its argument, None if none."""
    target: Any = node.target
    if node.op == "call_module":
        return None
    if isinstance(target, torch._ops.OpOverload):
        packet, overload = str(target).removeprefix("aten.").split(".")
        known = packet not in ("copy_", "index_put_")
        pure = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), overload, None) if known else None
        return SAME_ARGUMENTS.get(pure, pure)
    name = str(target if isinstance(target, str) else getattr(target, "__name__", "")).removesuffix("_")
    pure = name if isinstance(target, str) and hasattr(torch.Tensor, name) else getattr(torch, name, None)
    return SPELLINGS.get(pure, pure)


def _has_other_views(node: Node, changed: Node, order: dict[Node, int]) -> bool:
    """Return whether other nodes that may share memory with `changed` are read after `node`."""
    root = memory_of(changed)
    queue, shared = [root], [root]
    while queue:
        views = [user for user in queue.pop().users if may_be_view(user) and user not in shared]
        queue += views
        shared += views
    return any(order[user] > order[node] for view in shared if view is not changed for user in view.users)


def _make_pure(node: Node) -> None:
    if "inplace" in node.kwargs:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        return
    pure = _pure(node)
    node.op = "call_method" if isinstance(pure, str) else "call_function"
    node.target = pure
