"""The contract of every pass: the stage before, the rewrite, the clean-up, the shapes, the stage after, the record."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch.fx import GraphModule

from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.graph.dataflow import overwrites
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.shapes import propagate_shapes
from ptq4vit_fx.passes.graph.stages import Stage, check_stage
from ptq4vit_fx.passes.graph.traced_module import PRESERVED
from ptq4vit_fx.plan import QuantPlan

P = ParamSpec("P")
Module = TypeVar("Module", bound=GraphModule)


@dataclass(frozen=True)
class Rewrite:
    """One pass that ran: its name, how many places it rewrote, and the seconds that it took."""

    name: str
    count: int
    seconds: float = field(default=0.0, compare=False)


def graph_pass(
    *, before: Stage, after: Stage
) -> Callable[[Callable[Concatenate[GraphModule, P], int]], Callable[Concatenate[GraphModule, P], GraphModule]]:
    """Make a pass of a function that rewrites a GraphModule in place and returns the number of rewrites.

    The pass checks that the graph is at the stage `before`, runs the function, removes dead code, lints, recompiles,
    computes the shapes of what changed, checks the graph against the stage `after`, appends a `Rewrite` to the history,
    and returns the same GraphModule. Raises PTQError on a graph at another stage, if what the function leaves is not
    legal, and whatever the function raises.
    """

    def decorate(
        rewrite: Callable[Concatenate[GraphModule, P], int],
    ) -> Callable[Concatenate[GraphModule, P], GraphModule]:
        @functools.wraps(rewrite)
        @exclusive()
        def run(graph_module: GraphModule, *args: P.args, **kwargs: P.kwargs) -> GraphModule:
            name, started = rewrite.__name__, time.perf_counter()
            _require(graph_module, before, name)
            count = rewrite(graph_module, *args, **kwargs)
            graph_module.graph.eliminate_dead_code(lambda node: node.is_impure() or overwrites(node))
            graph_module.graph.lint()
            graph_module.recompile()
            propagate_shapes(graph_module, name)
            check_stage(graph_module, after, pass_name=name)
            enter(graph_module, after, Rewrite(name, count, time.perf_counter() - started))
            return graph_module

        return cast("Callable[Concatenate[GraphModule, P], GraphModule]", run)

    return decorate


def _require(graph_module: GraphModule, before: Stage, name: str) -> None:
    stage = stage_of(graph_module)
    if stage is not before:
        raise failure(
            f"pass {name}",
            f"graph after {', '.join(r.name for r in history(graph_module)) or 'no pass'}",
            expected=f"stage {before.value!r}",
            got=f"stage {stage.value if stage else None!r}",
            do="run the passes in the order of ptq4vit_fx/pipeline.py",
        )


def enter(graph_module: GraphModule, stage: Stage, rewrite: Rewrite) -> None:
    """Record that `rewrite` brought the graph to `stage`."""
    graph_module.meta["ptq4vit_stage"] = stage
    graph_module.meta["ptq4vit_history"] = (*history(graph_module), rewrite)


def attach(graph_module: Module, **values: Any) -> Module:
    """Set attributes that survive copies and files of the GraphModule; return it."""
    preserved = graph_module.meta.setdefault(PRESERVED, {})
    for name, value in values.items():
        preserved[name] = value
        setattr(graph_module, name, value)
    return graph_module


def on_cpu(graph_module: GraphModule) -> GraphModule:
    """Return a copy on the CPU, its calibration too: constants that are made on the way are there."""
    copied, calibration = copy.deepcopy(graph_module).cpu(), calibration_of(graph_module)
    return attach(copied, calibration=calibration and calibration.to(torch.device("cpu")))


def sharing_tensors(graph_module: GraphModule) -> GraphModule:
    """Return a copy that has the same parameters and buffers until it is given others."""
    shared = {id(tensor): tensor for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    return copy.deepcopy(graph_module, shared)


def plan_of(graph_module: GraphModule) -> QuantPlan:
    """Return the plan that annotate attached."""
    return cast("QuantPlan", graph_module.plan)


def calibration_of(graph_module: GraphModule) -> Calibration | None:
    """Return the calibration of a prepared or converted model, None before it is calibrated."""
    return cast("Calibration | None", graph_module.calibration)


def stage_of(graph_module: GraphModule) -> Stage | None:
    """Return the stage of a graph, None if no pass of this package has touched it."""
    # A subclass of another package may have no meta: torchvision's feature extractor never calls GraphModule.__init__.
    meta: dict[str, Any] = getattr(graph_module, "meta", {})
    return meta.get("ptq4vit_stage")


def history(graph_module: GraphModule) -> tuple[Rewrite, ...]:
    """Return the passes that ran on this graph, oldest first."""
    return tuple(graph_module.meta.get("ptq4vit_history", ()))
