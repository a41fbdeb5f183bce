"""What a legal graph is at each stage, as code that runs between the passes.

| stage | a legal graph |
|---|---|
| traced | is of the model's own calls: nothing that a later stage inserts |
| canonical | has every product, activation and norm in its canonical form, no identities, no fused attention |
| observed | has an observer, and nobody else, behind every product of the plan |
| simulated | has a quantizer, or stored codes, on both operands of every product of the plan, and no observer |
| lowered | has dequantized codes on both operands of every product of the plan, and no quantizer module |
| converted | multiplies the codes of every product of the plan as integers, or lists it as a product in float |
| qdq | has every such product as ONNX writes it: both operands dequantized, multiplied in float |
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.errors import failure
from ptq4vit_fx.names import OPERANDS, Site, operand_of, site
from ptq4vit_fx.passes.graph.activations import BY_MODULE, SPELLINGS
from ptq4vit_fx.passes.graph.marks import kind_of, planned_product, planned_products, scope_of
from ptq4vit_fx.passes.graph.observer import ProductObserver
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, INTEGER_MATMUL, QUANTIZE
from ptq4vit_fx.plan import FloatOp
from ptq4vit_fx.product_forms import FORMS, form_of
from ptq4vit_fx.quantizers import Unquantized

#: Where a GraphModule keeps the products of the plan that no runtime multiplies as integers, and why.
FLOAT_PRODUCTS = "ptq4vit_float_products"


class Stage(enum.Enum):
    """Stages of a graph, in order."""

    TRACED = "traced"
    CANONICAL = "canonical"
    OBSERVED = "observed"
    SIMULATED = "simulated"
    LOWERED = "lowered"
    CONVERTED = "converted"
    QDQ = "qdq"


def float_products(graph_module: GraphModule) -> tuple[FloatOp, ...]:
    """Return what a converted graph multiplies in float, with the reasons: products of the plan, and all others."""
    plan: Any = getattr(graph_module, "plan", None)
    return (*graph_module.meta.get(FLOAT_PRODUCTS, ()), *(plan.float_ops if plan is not None else ()))


def check_stage(graph_module: GraphModule, stage: Stage, *, pass_name: str) -> None:
    """Raise PTQError that names the pass and the node if the graph breaks an invariant of `stage`."""
    for node, fault in _CHECKS[stage](graph_module):
        raise failure(
            f"pass {pass_name}",
            f"node {node.name}" if isinstance(node, Node) else f"product {node}",
            expected=f"a graph that is legal at stage {stage.value!r}",
            got=fault,
            do="report this as a bug in that pass",
        )


#: A node, or the name of a product that has none, and what is wrong with it.
Fault = tuple[Node | str, str]

#: What only passes insert.
INSERTED = (QUANTIZE, DEQUANTIZE, INTEGER_MATMUL)
#: Modules that a canonical graph has as calls of functions, or not at all.
REPLACED_MODULES = {*BY_MODULE, *(form.module for form in FORMS if form.module), nn.LayerNorm, nn.Dropout, nn.Identity}


def _traced(graph_module: GraphModule) -> Iterator[Fault]:
    for node in graph_module.graph.nodes:
        if node.target in INSERTED or isinstance(_module(graph_module, node), ProductObserver):
            yield node, f"{node._pretty_print_target(node.target)}, which a later pass inserts"
        elif planned_product(node) is not None:
            yield node, f"product {planned_product(node)} of a plan, in front of the plan"


def _canonical(graph_module: GraphModule) -> Iterator[Fault]:
    for node in graph_module.graph.nodes:
        module = _module(graph_module, node)
        if type(module) in REPLACED_MODULES and getattr(module, "padding_mode", "zeros") == "zeros":
            yield node, f"a module call of {type(module).__name__}"
        elif node.target is F.scaled_dot_product_attention:
            yield node, "a fused attention"
        elif node.op in ("call_function", "call_method") and _is_spelled_otherwise(node):
            yield node, f"{node.format_node()}, which is no canonical call"


def _is_spelled_otherwise(node: Node) -> bool:
    form = form_of(node.target)
    if form is None:
        return node.target in SPELLINGS
    return kind_of(node) is None and form.bind(node.args, node.kwargs) is not None


def _observed(graph_module: GraphModule) -> Iterator[Fault]:
    yield from _missing_products(graph_module)
    for node, name in planned_products(graph_module.graph):
        modules = [_module(graph_module, user) for user in node.users]
        if not [module for module in modules if isinstance(module, ProductObserver) and module.op_name == name]:
            yield node, f"product {name} without an observer"
        elif len(modules) > 1:
            yield node, f"product {name} with a reader beside its observer"


def _simulated(graph_module: GraphModule) -> Iterator[Fault]:
    yield from _missing_products(graph_module)
    for node in graph_module.graph.nodes:
        if isinstance(_module(graph_module, node), ProductObserver):
            yield node, "an observer"
    for node, name in planned_products(graph_module.graph):
        for value, operand in zip(node.args[:2], OPERANDS, strict=True):
            if not _is_quantized(value, site(name, operand)):
                yield node, f"operand {value} of {name} without a quantizer"


def _is_quantized(value: Any, key: Site) -> bool:
    """Return whether a value comes from the quantizer of a site, or from its stored codes."""
    if not isinstance(value, Node) or scope_of(value) != key:
        return False
    return value.op == "call_module" or value.target is DEQUANTIZE


def _lowered(graph_module: GraphModule) -> Iterator[Fault]:
    yield from _missing_products(graph_module)
    for node in graph_module.graph.nodes:
        module = _module(graph_module, node)
        if module is not None and type(module).__module__.startswith("ptq4vit_fx."):
            yield node, f"a module call of {type(module).__name__}"
    for node, name in planned_products(graph_module.graph):
        if node.target is not INTEGER_MATMUL:
            yield from _not_dequantized(graph_module, node, name)


def _converted(graph_module: GraphModule) -> Iterator[Fault]:
    yield from _lowered(graph_module)
    listed = {product.name for product in float_products(graph_module)}
    for node, name in planned_products(graph_module.graph):
        if node.target is not INTEGER_MATMUL and name not in listed:
            yield node, f"product {name} in float, and not listed"


def _qdq(graph_module: GraphModule) -> Iterator[Fault]:
    yield from _missing_products(graph_module)
    for node in graph_module.graph.nodes:
        if node.target is INTEGER_MATMUL:
            yield node, "a product on integer codes"
    for node, name in planned_products(graph_module.graph):
        yield from _not_dequantized(graph_module, node, name)


def _not_dequantized(graph_module: GraphModule, node: Node, name: str) -> Iterator[Fault]:
    quantizers: Any = getattr(getattr(graph_module, "plan", None), "quantizers", {})
    for value, operand in zip(node.args[:2], OPERANDS, strict=True):
        if isinstance(quantizers.get(site(name, operand)), Unquantized):
            continue
        source = value.args[0] if isinstance(value, Node) and value.target in TRANSPOSITIONS else value
        if not isinstance(source, Node) or source.target is not DEQUANTIZE:
            yield node, f"operand {value} of {name} is not dequantized"
        elif operand_of(scope_of(source)) is None:
            yield node, f"operand {value} of {name} has no site"


def _missing_products(graph_module: GraphModule) -> Iterator[Fault]:
    present = {name for _, name in planned_products(graph_module.graph)}
    plan: Any = getattr(graph_module, "plan", None)
    yield from ((op.name, "no node") for op in (plan.ops if plan is not None else ()) if op.name not in present)


def _module(graph_module: GraphModule, node: Node) -> nn.Module | None:
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


#: A computed weight is transposed between its dequantization and its product.
TRANSPOSITIONS = (torch.transpose,)

_CHECKS: dict[Stage, Callable[[GraphModule], Iterator[Fault]]] = {
    Stage.TRACED: _traced,
    Stage.CANONICAL: _canonical,
    Stage.OBSERVED: _observed,
    Stage.SIMULATED: _simulated,
    Stage.LOWERED: _lowered,
    Stage.CONVERTED: _converted,
    Stage.QDQ: _qdq,
}
