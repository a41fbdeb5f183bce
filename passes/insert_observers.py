"""Put an observer behind every planned product."""

from __future__ import annotations

from torch.fx import GraphModule

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta
from ptq4vit_fx.passes.graph.observer import ProductObserver
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.CANONICAL, after=Stage.OBSERVED)
def insert_observers(graph_module: GraphModule) -> int:
    """Insert `out = observer(lhs, rhs, bias, out)` behind every product of the plan; values do not change."""
    count = 0
    for node in list(graph_module.graph.nodes):
        op_name = node.meta.get("ptq4vit_op")
        if op_name is None:
            continue
        target = f"{op_name.replace('.', '_')}_observer"
        graph_module.add_submodule(target, ProductObserver(op_name))
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        with graph_module.graph.inserting_after(node):
            observer = graph_module.graph.call_module(target, (node.args[0], node.args[1], bias, node))
        adopt_meta(observer, node)
        node.replace_all_uses_with(observer, delete_user_cb=lambda user, own=observer: user is not own)
        count += 1
    return count
