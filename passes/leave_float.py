"""Let the products that the plan has left run in float: their observers go, and what named them as planned."""

from __future__ import annotations

from torch.fx import GraphModule

from ptq4vit_fx.passes.graph.contract import graph_pass, plan_of
from ptq4vit_fx.passes.graph.marks import planned_products, unmark_product
from ptq4vit_fx.passes.graph.rewriter import replace
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.OBSERVED, after=Stage.OBSERVED)
def leave_float(graph_module: GraphModule) -> int:
    """Take away the observer of every product that was planned when the graph was prepared, and is no more.

    `annotate` plans what the mapping says; a plan that leaves more in float, as that of `tune`, is set later. Balances
    are found by products that were planned, so they are applied in front of this.
    """
    planned, count = {op.name for op in plan_of(graph_module).ops}, 0
    for node, name in planned_products(graph_module.graph):
        if name in planned:
            continue
        (observer,) = node.users
        replace(observer, node)
        graph_module.delete_submodule(str(observer.target))
        unmark_product(node)
        count += 1
    return count
