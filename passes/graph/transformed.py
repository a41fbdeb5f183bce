"""Where the passes that transform a float graph wrote down what they did, and what not and why."""

from __future__ import annotations

from torch.fx import GraphModule

from ptq4vit_fx.plan import Transformed

#: Where a GraphModule keeps it until `annotate` puts it into the plan.
TRANSFORMED = "ptq4vit_transformed"


def note(graph_module: GraphModule, *places: Transformed) -> None:
    """Remember places where a transform was applied, or not."""
    graph_module.meta[TRANSFORMED] = (*graph_module.meta.get(TRANSFORMED, ()), *places)
