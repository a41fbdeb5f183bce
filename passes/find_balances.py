"""Find where channels can be balanced, and put that into the plan."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from ptq4vit_fx.passes.graph.balance_places import balance_places
from ptq4vit_fx.passes.graph.balanced_layers import mark_places
from ptq4vit_fx.passes.graph.contract import attach, graph_pass, plan_of
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.CANONICAL, after=Stage.CANONICAL)
def find_balances(graph_module: GraphModule) -> int:
    """Plan a balance wherever the plan's transforms ask for one and the function stays what it is.

    The numbers are the calibration's; nothing changes here. What cannot be balanced is in `plan.transformed`, with the
    reason.
    """
    plan = plan_of(graph_module)
    places, notes = balance_places(graph_module, plan.transforms)
    mark_places(places)
    balances = tuple(place.balance for place in places)
    attach(graph_module, plan=replace(plan, balances=balances, transformed=(*plan.transformed, *notes)))
    return len(places)
