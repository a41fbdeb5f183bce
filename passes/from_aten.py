"""Spell the aten calls of torch.export as torch.fx's tracer spells them: one canonical form behind both tracers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.activations import BY_ATEN, IN_PLACE
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.product_forms import FORMS

aten = torch.ops.aten

#: Calls with the same arguments. What is missing here is no product, no activation, and stays an aten call.
SAME_ARGUMENTS: dict[Any, Callable[..., Any]] = {
    **{spelling: form.function for form in FORMS for spelling in form.spellings if hasattr(spelling, "overloadpacket")},
    **BY_ATEN,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.dropout.default: F.dropout,
    aten.feature_dropout.default: F.dropout2d,
    aten.alpha_dropout.default: F.alpha_dropout,
}


@graph_pass(before=Stage.TRACED, after=Stage.TRACED)
def from_aten(graph_module: GraphModule) -> int:
    """Replace aten calls by the functions that compute them, bit for bit; a graph of torch.fx's tracer has none."""
    count = 0
    for node in list(graph_module.graph.nodes):
        call = _call(node) if node.op == "call_function" else None
        if call is not None:
            function, args, kwargs = call
            replace(node, Writer(node)(function, *args, **kwargs))
            count += 1
    return count


def _call(node: Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    args: tuple[Any, ...] = node.args
    if node.target in SAME_ARGUMENTS:
        return SAME_ARGUMENTS[node.target], args, dict(node.kwargs)
    if node.target in IN_PLACE:
        return IN_PLACE[node.target], args, {"inplace": True}
    if node.target is aten.layer_norm.default:  # the sixth argument is cudnn's
        return F.layer_norm, args[:2], dict(zip(("weight", "bias", "eps"), args[2:5], strict=False)) | node.kwargs
    if node.target is aten.softmax.int and not any(args[2:]):
        return F.softmax, args[:1], {"dim": args[1]}
    if node.target is aten.einsum.default:
        return torch.einsum, (args[0], *args[1]), {}
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default) and tuple(args[1:]) == (0.0, 6.0):
        return F.relu6, args[:1], {"inplace": True} if node.target is aten.hardtanh_.default else {}
    return None
