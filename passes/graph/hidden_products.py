"""What multiplies, or may, and is no product of the plan: modules that are not traced into, operators of others."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule

from ptq4vit_fx.names import join
from ptq4vit_fx.passes.graph.marks import kind_of, scope_of
from ptq4vit_fx.passes.graph.opaque import OPAQUE
from ptq4vit_fx.passes.graph.shapes import MULTIPLIES
from ptq4vit_fx.plan import FloatOp


def _setting(module: nn.Module) -> str:
    """Return in words which setting of a module keeps it from being a product, "" if it is its type."""
    mode = getattr(module, "padding_mode", "zeros")
    return "" if mode == "zeros" else f"with padding_mode={mode!r} (write the padding as a layer, F.pad, in front) "


def hidden_products(graph_module: GraphModule) -> list[FloatOp]:
    """List what multiplied while shapes were recorded, or could have unseen, but is no QuantOp: nothing is unsaid."""
    found = []
    for node in graph_module.graph.nodes:
        hidden = node.meta.get(OPAQUE, "")
        if not (node.meta.get(MULTIPLIES) or hidden) or kind_of(node) is not None:
            continue
        if node.op != "call_module":
            name = hidden or getattr(node.target, "__name__", str(node.target))
            reason = "is an operator that cannot be looked into" if hidden else "is not supported"
            found.append(FloatOp(join(scope_of(node), node.name), f"{name} {reason}"))
            continue
        module = graph_module.get_submodule(str(node.target))
        inside = [name for name, m in module.named_modules() if name and isinstance(m, nn.Linear | nn.Conv2d)]
        inside += [f"the operator {hidden}"] if hidden else []
        reason = f"is not traced into; inside: {', '.join(inside)}" if inside else f"{_setting(module)}is not supported"
        found.append(FloatOp(str(node.target), f"{type(module).__name__} {reason}"))
    return found
