"""One model of products in several forms: its plan, its calibration, and the operands of its products."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, cast

from torch import nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.api import load_calibration, prepare_fx
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.proof.product_timing import ProductShapes
from ptq4vit_fx.inputs.settings import Transforms
from ptq4vit_fx.names import OPERANDS, site
from ptq4vit_fx.passes.graph.contract import attach, plan_of, sharing_tensors
from ptq4vit_fx.passes.graph.marks import kind_of, planned_products
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.traced_module import TracedModule
from ptq4vit_fx.pipeline import CONVERSION
from ptq4vit_fx.plan import FloatOp, QuantPlan
from ptq4vit_fx.recipes import best
from ptq4vit_fx.tuning.forms import FLOAT, Form

#: Product -> form.
Choice = Mapping[str, Form]
LEFT_FLOAT = "left float by tune"


def mixed_calibration(
    plan: QuantPlan, found: Mapping[Form, Calibration], choice: Choice, facts: Mapping[str, Any] | None = None
) -> Calibration:
    """Return the calibration of a model whose products have these forms; the float ones are in no plan of it.

    plan: of all products. found: calibrations of the forms. facts: what its provenance says besides.
    """
    first = next(iter(found.values()))
    ops = tuple(op for op in plan.ops if choice[op.name] != FLOAT)
    if not ops:
        do = "allow more, or leave the model in float"
        raise failure("tune", "plan", expected="a product that is quantized", got="all of them float", do=do)
    owners = {op.name: found[choice[op.name]] for op in ops}
    sites = [(site(name, operand), own) for name, own in owners.items() for operand in OPERANDS]
    left = tuple(FloatOp(op.name, LEFT_FLOAT, asked=True) for op in plan.ops if op.name not in owners)
    quantizers = {key: own.plan.quantizers[key] for key, own in sites}
    of_outputs = {name: own.snr[name] for name, own in owners.items()}
    return replace(
        first,
        plan=replace(plan, ops=ops, quantizers=quantizers, float_ops=(*plan.float_ops, *left)),
        params={key: own.params[key] for key, own in sites},
        distances={name: own.distances[name] for name, own in owners.items()},
        snr={key: own.snr[key] for key, own in sites} | of_outputs,
        shares={name: own.shares[name] for name, own in owners.items() if name in own.shares},
        without_gradient=tuple(name for name, own in owners.items() if name in own.without_gradient),
        seconds={name: own.seconds[name] for name, own in owners.items() if name in own.seconds},
        codes={key: own.codes[key] for key, own in sites if key in own.codes},
        provenance=first.provenance | dict(facts or {}),
    )


def with_calibration(prepared: GraphModule, calibration: Calibration) -> TracedModule:
    """Return a model, sharing its tensors, that has the plan and the scales of a calibration that `tune` made.

    prepared: the same model from `prepare_fx`, whose plan has all products of the calibration's. Raises PTQError if it
    has not, and as `load_calibration` does.
    """
    unknown = [op.name for op in calibration.plan.ops if op not in plan_of(prepared).ops]
    if unknown:
        do = "prepare the model that was calibrated, with the same recipe"
        raise failure("tune", unknown[0], expected="a product of this model", got="none like it", do=do)
    return load_calibration(attach(sharing_tensors(prepared), plan=calibration.plan, calibration=None), calibration)


def model_of_plan(model: nn.Module, plan: QuantPlan, example: Any) -> GraphModule:
    """Return a float model prepared as a plan says, whatever mapping it was made from.

    Raises PTQError if the model has not its products and balances, and as `prepare_fx` does.
    """
    mapping = best().with_transforms(
        **{entry.name: getattr(plan.transforms, entry.name) for entry in fields(Transforms)}
    )
    prepared = prepare_fx(model, mapping, example)
    own = {op.name: op for op in plan_of(prepared).ops}
    other = [op.name for op in plan.ops if own.get(op.name) != op]
    # What the plan leaves float has no balances in it; here it is planned.
    if other or not set(plan.balances) <= set(plan_of(prepared).balances):
        do = "pass the model, its weights and its --model-arg as they were when it was quantized"
        got = f"a model without {other[0]}" if other else "a model with other balances"
        raise failure("why", "model", expected="the one that was calibrated", got=got, do=do)
    return attach(prepared, plan=plan)


def product_shapes(calibrated: GraphModule) -> dict[str, ProductShapes]:
    """Return product -> shapes of its operands at the example input, as the converted model will have them.

    A patch embedding is the linear layer that it becomes; any other convolution stays one, which runtimes compute in
    float.
    """
    simulated = CONVERSION.until("lower_patch_convolution").run(copy.deepcopy(calibrated))
    found = {}
    for node, name in planned_products(simulated.graph):
        kind, (lhs, rhs) = kind_of(node), (shape_of(cast("Node", operand)) for operand in node.args[:2])
        assert kind is not None
        found[name] = ProductShapes(kind, lhs, rhs, plan_of(calibrated).op(name).rhs_is_weight)
    return found
