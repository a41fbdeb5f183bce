"""Remove what does nothing in evaluation mode: Identity, Dropout, DropPath, and slices that leave nothing out."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.rewriter import replace
from ptq4vit_fx.passes.graph.stages import Stage

IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, DropPath)
DROPOUT_FUNCTIONS = (F.dropout, F.dropout2d, F.alpha_dropout)


@graph_pass(before=Stage.TRACED, after=Stage.TRACED)
def remove_identities(graph_module: GraphModule) -> int:
    """Replace every identity by its input; a dropout that is active in evaluation (`training=True`) is left alone."""
    modules = dict(graph_module.named_modules())
    found = [node for node in graph_module.graph.nodes if _is_identity(node, modules)]
    for node in found:
        replace(node, node.args[0])
    return len(found)


def _is_identity(node: Node, modules: dict[str, nn.Module]) -> bool:
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], IDENTITY_MODULES)
    if node.op == "call_function" and node.target in DROPOUT_FUNCTIONS:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        return training is False or bool(probability == 0.0)
    if node.target is torch.ops.aten.slice.Tensor:  # torch.export writes x[:, 0] as x[:][:, 0]
        return node.args[2:] == (0, sys.maxsize)
    return False
