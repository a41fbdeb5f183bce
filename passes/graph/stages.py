"""What a legal graph is at each stage, as code that runs between the passes."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.graph.operators import INTEGER_MATMUL
from ptq4vit_fx.plan import ProductKind

PRODUCT_TARGETS: dict[Any, ProductKind] = {F.linear: "linear", F.conv2d: "conv2d", torch.matmul: "matmul"}


class Stage(enum.Enum):
    """Stages of a graph, in order."""

    TRACED = "traced"
    CANONICAL = "canonical"
    OBSERVED = "observed"
    SIMULATED = "simulated"
    CONVERTED = "converted"
    QDQ = "qdq"


def check_stage(graph_module: GraphModule, stage: Stage, *, pass_name: str) -> None:
    """Raise PTQError that names the pass and the node if the graph breaks an invariant of `stage`."""
    check = _CHECKS.get(stage)
    if check is None:
        return
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        fault = check(node, modules)
        if fault:
            raise failure(
                f"pass {pass_name}",
                f"node {node.name}",
                expected=f"a graph that is legal at stage {stage.value!r}",
                got=fault,
                do="report this as a bug in that pass",
            )


def _canonical(node: Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        module = modules[str(node.target)]
        for kind in (nn.Softmax, nn.GELU, nn.LayerNorm, nn.ReLU, nn.SiLU, nn.Dropout, nn.Identity):
            if isinstance(module, kind):
                return f"a module call of {type(module).__name__}"
        if type(module) is nn.Linear:
            return "a module call of Linear"
    if node.target is F.scaled_dot_product_attention:
        return "a fused attention"
    return None


def _observed(node: Node, modules: dict[str, nn.Module]) -> str | None:
    if "ptq4vit_op" in node.meta and not any(
        user.op == "call_module" and type(modules[str(user.target)]).__name__ == "ProductObserver"
        for user in node.users
    ):
        return f"product {node.meta['ptq4vit_op']} without an observer"
    return None


def _simulated(node: Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module" and type(modules[str(node.target)]).__name__ == "ProductObserver":
        return "an observer"
    if "ptq4vit_op" in node.meta:
        for operand in node.all_input_nodes[:2]:
            if "ptq4vit_site" not in operand.meta:
                return f"operand {operand.name} of {node.meta['ptq4vit_op']} without a quantizer"
    return None


def _qdq(node: Node, modules: dict[str, nn.Module]) -> str | None:
    return "a product on integer codes" if node.target is INTEGER_MATMUL else None


_CHECKS: dict[Stage, Callable[[Node, dict[str, nn.Module]], str | None]] = {
    Stage.CANONICAL: _canonical,
    Stage.OBSERVED: _observed,
    Stage.SIMULATED: _simulated,
    Stage.QDQ: _qdq,
}
