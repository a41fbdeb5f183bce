"""Name every product, recognize where its operands come from, and choose quantizers from the QConfigMapping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ptq4vit_fx.activations import NEGATIVE_RANGE, SourceActivation
from ptq4vit_fx.errors import failure, near_names, some_names, warn
from ptq4vit_fx.inputs.settings import SearchSettings
from ptq4vit_fx.names import (
    OPERANDS,
    Operand,
    identifier,
    is_inside,
    is_meant,
    join,
    leaf_of,
    owner_of,
    site,
    with_owners,
)
from ptq4vit_fx.passes.fold_constants import FOLDED_WEIGHT
from ptq4vit_fx.passes.graph.activations import MULTIPLICATIONS, activation_of
from ptq4vit_fx.passes.graph.behaviour import sizes_on_another_batch
from ptq4vit_fx.passes.graph.contract import attach, graph_pass
from ptq4vit_fx.passes.graph.dataflow import downstream, is_stored, origin, stored_path
from ptq4vit_fx.passes.graph.hidden_products import hidden_products
from ptq4vit_fx.passes.graph.marks import kind_of, mark_product, put_in_scope, scope_of, scopes_of
from ptq4vit_fx.passes.graph.own_names import RENAMED
from ptq4vit_fx.passes.graph.rewriter import rename
from ptq4vit_fx.passes.graph.shapes import EXAMPLE_BATCH, MULTIPLIES, shape_of
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.graph.transformed import TRANSFORMED
from ptq4vit_fx.plan import FloatOp, QuantOp, QuantPlan
from ptq4vit_fx.product_forms import ProductKind
from ptq4vit_fx.qconfig import QConfig, QConfigMapping
from ptq4vit_fx.quantizers import Quantizer, TwinUniform, Uniform, Unquantized

#: So many reasons why products stay float are told in the warning.
MOST_REASONS = 3


@graph_pass(before=Stage.CANONICAL, after=Stage.CANONICAL)
def annotate(graph_module: GraphModule, mapping: QConfigMapping, closed: Sequence[str] = ()) -> int:
    """Mark each planned product node with its name and store the plan as `graph_module.plan`.

    closed: paths of modules whose products stay float, whether the tracer went into them or not.

    Raises PTQError if a rule of the mapping matches nothing (it lists near names) or if no product is left to
    quantize. Warns once, with names and reasons, of the products that stay float and are none that a rule leaves so.
    """
    closed = [graph_module.meta.get(RENAMED, {}).get(path, path) for path in closed]
    products = _name_products(graph_module)
    hidden = hidden_products(graph_module)
    _check_rules(mapping, [(op.name, op.kind) for _, op in products], [op.name for op in hidden])
    group_counts = _attention_operands_per_weight(products)
    ops: list[QuantOp] = []
    quantizers: dict[str, Quantizer] = {}
    searches: dict[str, SearchSettings] = {}
    float_ops = [replace(op, asked=mapping.leaves_float(op.name)) for op in hidden]
    for node, op in products:
        if reason := _float_reason(node, op, closed):
            float_ops.append(FloatOp(op.name, reason))
            continue
        qconfig, rule = mapping.resolve(op.name, op.kind)
        chosen = {operand: _quantizer(node, op, operand, qconfig, group_counts) for operand in OPERANDS}
        lhs, rhs = chosen["lhs"], chosen["rhs"]
        if isinstance(lhs, Unquantized) and isinstance(rhs, Unquantized):
            float_ops.append(FloatOp(op.name, "both operands are activations, which stay float", asked=True))
            continue
        if qconfig is None or lhs is None or rhs is None:
            reason = f"left float by {rule}" if rule else "no rule of the QConfigMapping matches it"
            float_ops.append(FloatOp(op.name, reason, asked=rule is not None))
            continue
        mark_product(node, op.name)
        ops.append(op)
        quantizers |= {site(op.name, "lhs"): lhs, site(op.name, "rhs"): rhs}
        searches[op.name] = qconfig.search
    if not ops:
        raise failure(
            "pass annotate",
            f"{len(products)} products",
            expected="at least one to quantize",
            got=f"none ({'; '.join(f'{f.name}: {f.reason}' for f in float_ops[:3]) or 'no product in the graph'})",
            do="set a global QConfig, for example recipes.ptq4vit()",
        )
    _check_changes(mapping, ops, float_ops)
    _warn_of([op for op in float_ops if not op.asked])
    quantizers |= _without_heads(graph_module, products, quantizers)
    attach(
        graph_module,
        plan=QuantPlan(
            tuple(ops),
            quantizers,
            searches,
            tuple(float_ops),
            mapping.transforms,
            (),
            graph_module.meta.get(TRANSFORMED, ()),
            mapping.recipe,
            mapping.loss,
            {op.name: _multiplications(graph_module, node) for node, op in products},
        ),
    )
    return len(ops)


def _multiplications(graph_module: GraphModule, node: Node) -> int:
    """Return how many multiplications a product takes for one image."""
    return int(node.meta.get(MULTIPLIES) or 0) // max(1, int(graph_module.meta[EXAMPLE_BATCH]))


def _warn_of(float_ops: list[FloatOp]) -> None:
    """Warn once of all products that stay float, with a few names for each reason; the plan has all of them."""
    names: dict[str, list[str]] = {}
    for float_op in float_ops:
        names.setdefault(float_op.reason, []).append(float_op.name)
    if len(float_ops) == 1:
        warn(f"{float_ops[0].name} stays float: {float_ops[0].reason}")
    elif float_ops:
        groups = [f"{some_names(same)} ({reason})" for reason, same in names.items()]
        said = some_names(groups, MOST_REASONS, "; ")
        warn(f"{len(float_ops)} products stay float, listed in plan.float_ops: {said}")


def _name_products(graph_module: GraphModule) -> list[tuple[Node, QuantOp]]:
    """Find the products in execution order, give each a unique readable name, and rename its node after it."""
    taken: dict[str, int] = {}
    products = []
    for node in graph_module.graph.nodes:
        kind = kind_of(node)
        if kind is None:
            continue
        base = _base_name(node, kind)
        repeat = taken.get(base, 0)
        taken[base] = repeat + 1
        name = f"{base}_{repeat}" if repeat else base
        rename(node, identifier(name))
        put_in_scope(node, node, name)
        products.append((node, _describe(node, name, kind)))
    return products


def _base_name(node: Node, kind: str) -> str:
    path = stored_path(node.args[1])
    if leaf_of(path) in ("weight", FOLDED_WEIGHT) and owner_of(path):
        return owner_of(path)
    return join(scope_of(node), _role(node, kind))


def _role(node: Node, kind: str) -> str:
    """matmul_qk feeds a softmax, matmul_av reads one; other products are called by their kind."""
    if kind != "matmul":
        return kind
    if any(_source(node, operand) == "softmax" for operand in OPERANDS):
        return "matmul_av"
    if any(user.target is F.softmax for user in downstream(node)):
        return "matmul_qk"
    return "matmul"


def _source(node: Node, operand: Operand) -> SourceActivation | None:
    value = node.args[OPERANDS.index(operand)]
    return activation_of(origin(value)) if isinstance(value, Node) else None


def _describe(node: Node, name: str, kind: ProductKind) -> QuantOp:
    weight = node.args[1]
    op = QuantOp(
        name,
        kind,
        lhs_source=_source(node, "lhs"),
        rhs_source=_source(node, "rhs"),
        rhs_is_weight=_is_weight(weight, kind),
    )
    if kind != "conv2d":
        return op
    stride, padding, dilation, groups = cast("tuple[Any, ...]", node.args[3:])
    return replace(op, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _is_weight(value: Any, kind: ProductKind) -> bool:
    return is_stored(value) and (kind != "matmul" or len(shape_of(value)) == 2)


def _attention_operands_per_weight(products: list[tuple[Node, QuantOp]]) -> dict[Node, int]:
    """Count, per linear, the operands of attention products that it computes: 3 for a fused q/k/v projection."""
    counts: dict[Node, int] = {}
    for node, op in products:
        if op.kind != "matmul":
            continue
        for operand in node.all_input_nodes:
            linear = _projection(operand)
            if linear is not None:
                counts[linear] = counts.get(linear, 0) + 1
    return counts


def _projection(node: Node) -> Node | None:
    """Return the linear that computed an attention operand, through moves, scalings and normalizations."""
    scaling = {*MULTIPLICATIONS, F.layer_norm, F.normalize}
    while True:
        node = origin(node)
        if node.target is F.linear:
            return node
        is_scaling = node.op == "call_function" and node.target in scaling
        if not is_scaling or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]


def _quantizer(
    node: Node, op: QuantOp, operand: Operand, qconfig: QConfig | None, group_counts: dict[Node, int]
) -> Quantizer | None:
    """Choose the quantizer of one operand; granularities that do not exist for it become per tensor."""
    if qconfig is None:
        return None
    if operand == "rhs" and op.rhs_is_weight:
        weight = qconfig.weight
        if op.kind == "conv2d" and weight is not None:
            weight = qconfig.kernel or weight
        if weight is None or weight.granularity != "group":
            return weight
        groups = group_counts.get(node, 1)
        return replace(weight, granularity="group" if groups > 1 else "tensor", groups=groups)
    value = cast("Node", node.args[OPERANDS.index(operand)])
    quantizer = qconfig.activation if op.kind != "matmul" else qconfig.matmul
    source = op.source(operand)
    if origin(value).op == "placeholder":
        quantizer = quantizer and (qconfig.image or quantizer)
    elif source == "softmax":
        quantizer = qconfig.softmax or quantizer
    elif source is not None and NEGATIVE_RANGE[source]:
        convolved = qconfig.convolved if op.kind == "conv2d" else None
        quantizer = convolved or qconfig.gelu or quantizer
        if isinstance(quantizer, TwinUniform) or (isinstance(quantizer, Uniform) and not quantizer.signed):
            quantizer = replace(quantizer, minimum=NEGATIVE_RANGE[source])
    elif source is not None and isinstance(quantizer, Uniform):
        quantizer = replace(quantizer, signed=False)
    if isinstance(quantizer, Uniform) and quantizer.granularity != "tensor":
        heads = op.kind == "matmul" and len(shape_of(value)) == 4
        quantizer = replace(quantizer, granularity="head" if heads else "tensor")
    return quantizer


def _without_heads(
    graph_module: GraphModule, products: list[tuple[Node, QuantOp]], quantizers: dict[str, Quantizer]
) -> dict[str, Quantizer]:
    """Return per tensor the quantizers that have a scale per head where the images are: (heads, batch, tokens, dim)."""
    per_head = {
        key: (quantizer, cast("Node", node.args[OPERANDS.index(operand)]))
        for node, op in products
        for operand in OPERANDS
        if isinstance(quantizer := quantizers.get(key := site(op.name, operand)), Uniform)
        and quantizer.granularity == "head"
    }
    sizes = sizes_on_another_batch(graph_module, {value for _, value in per_head.values()}) if per_head else {}
    return {
        key: replace(quantizer, granularity="tensor")
        for key, (quantizer, value) in per_head.items()
        if value in sizes and sizes[value][-3] != shape_of(value)[-3]
    }


def _check_rules(mapping: QConfigMapping, products: list[tuple[str, str]], hidden: list[str]) -> None:
    for method, key in mapping.unmatched(products, hidden):
        names = with_owners(name for name, _ in products)
        if method == "QConfigMapping.set_object_type":
            names = sorted({kind for _, kind in products})
        raise failure(
            method,
            repr(key),
            expected="a rule that matches at least one product",
            got="no match",
            do=f"near names: {near_names(key, names)}",
        )


def _check_changes(mapping: QConfigMapping, ops: list[QuantOp], float_ops: list[FloatOp]) -> None:
    """Raise PTQError on bits of nothing but products that stay float."""
    for change in mapping.changes:
        if change.leaves_float or any(is_meant(op.name, change.pattern) for op in ops):
            continue
        found = next(op for op in float_ops if is_meant(op.name, change.pattern))
        expected, got = "at least one product that is quantized", f"{found.name}, which stays float ({found.reason})"
        raise failure(change.operation, repr(change.pattern), expected=expected, got=got, do="leave it out")


def _float_reason(node: Node, op: QuantOp, closed: Sequence[str]) -> str | None:
    """Return why this product cannot or must not be quantized, whatever the mapping says."""
    inside = [path for path in closed if any(is_inside(name, path) for name in (op.name, *scopes_of(node)))]
    if inside:
        return f"{inside[0]} is one of leaf_modules"
    if op.kind != "matmul" and not op.rhs_is_weight:
        return "its weight depends on the input"
    return None
