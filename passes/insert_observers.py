"""Put an observer behind every planned product."""

from __future__ import annotations

from torch.fx import GraphModule

from ptq4vit_fx.names import identifier
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.observer import ProductObserver
from ptq4vit_fx.passes.graph.rewriter import Writer
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.CANONICAL, after=Stage.OBSERVED)
def insert_observers(graph_module: GraphModule) -> int:
    """Insert `out = observer(lhs, rhs, bias, out)` behind every product of the plan; values do not change."""
    count = 0
    for node, name in planned_products(graph_module.graph):
        target = f"{identifier(name)}_observer"
        graph_module.add_submodule(target, ProductObserver(name))
        lhs, rhs, bias = (*node.args[:3], None)[:3]
        observer = Writer(node.next, like=node).module(target, lhs, rhs, bias, node)
        for user in [user for user in node.users if user is not observer]:
            user.replace_input_with(node, observer)
        count += 1
    return count
