"""Whether a calibration, found here, read from a file or made by hand, is one of a prepared model."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.calibration import Calibration, fingerprint_tensors
from ptq4vit_fx.errors import failure, quoted
from ptq4vit_fx.inputs.records import Place
from ptq4vit_fx.names import OPERANDS, Operand, site
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.quantizers import Quantizer
from ptq4vit_fx.search.products import scale_groups, site_params, to_product

#: The fact of a calibration's provenance that `check_weights` compares.
WEIGHTS_FINGERPRINT = "weights_fingerprint"


def check_fits(prepared: GraphModule, calibration: Calibration, operation: str) -> None:
    """Raise PTQError unless a calibration has scales for every site of a prepared model's plan, as its operands need.

    What is not compared: how the plan's products were searched, which leaves no trace in the graph.
    """
    plan = plan_of(prepared)
    if not isinstance(calibration, Calibration):
        do = "read a file with Calibration.load(path)"
        raise failure(operation, "calibration", expected="a Calibration", got=type(calibration).__name__, do=do)
    if calibration.plan.quantizers != plan.quantizers:
        mine, theirs = plan.quantizers, calibration.plan.quantizers
        first = next(key for key in (*mine, *theirs) if mine.get(key) != theirs.get(key))
        raise failure(
            operation,
            f"site {first}",
            expected=f"{mine.get(first, 'no such site in this model')}",
            got=f"{theirs.get(first, 'no such site in the calibration')}",
            do="prepare with the recipe and the model that were calibrated",
        )
    if calibration.plan.balances != plan.balances or calibration.plan.transforms != plan.transforms:
        expected, got = (f"{len(p.balances)} balances, {p.transforms}" for p in (plan, calibration.plan))
        do = "prepare with the recipe and the model that were calibrated"
        raise failure(operation, "transforms", expected=expected, got=got, do=do)
    missing = [key for key in plan.quantizers if key not in calibration.params]
    missing += [balance.name for balance in plan.balances if balance.name not in calibration.balances]
    if missing:
        raise failure(
            operation,
            f"site {missing[0]}",
            expected="scales of every site",
            got=f"a checkpoint that lacks {len(missing)} of {len(plan.quantizers)} sites",
            do="finish it with calibrate(prepared, images, checkpoint=path)",
        )
    check_shapes(prepared, calibration, operation)


def check_shapes(prepared: GraphModule, calibration: Calibration, operation: str) -> None:
    """Raise PTQError unless each parameter that there is is one of its quantizer, as long as its operand has scales."""
    calibration.check(operation, "calibration")
    plan = plan_of(prepared)
    ops = {op.name: op for op in plan.ops}
    for node, name in planned_products(prepared.graph):
        for operand in OPERANDS if name in ops else ():
            key = site(name, operand)
            params, quantizer = calibration.params.get(key), plan.quantizers[key]
            if params is None or quantizer.granularity == "tensor":
                continue
            expected = _scales(ops[name], operand, quantizer, node)
            (scale,) = params.tensors().values()
            if (scale.shape, params.axis) != expected:
                place = Place(operation, f"site {key}", do="calibrate this model")
                told = [f"shape {tuple(shape)}, axis {axis}" for shape, axis in (expected, (scale.shape, params.axis))]
                raise place.refusal(f"scales of {told[0]}", told[1])


def _scales(op: QuantOp, operand: Operand, quantizer: Quantizer, node: Node) -> tuple[torch.Size, int | None]:
    """Return the shape and the axis of the scales that the search gives an operand of a uniform quantizer."""
    lhs, rhs = (torch.empty(shape_of(cast("Node", x)), device="meta") for x in node.args[:2])
    if op.kind == "matmul" and not op.rhs_is_weight:
        lhs, rhs = (x.expand(*shape_of(node)[:-2], *x.shape[-2:]) for x in (lhs, rhs))  # as they are captured
    product, is_weight = to_product(op, lhs, rhs), operand == "rhs" and op.rhs_is_weight
    groups = scale_groups(quantizer.granularity, getattr(quantizer, "groups", 1), product, op, is_weight=is_weight)
    scale = torch.empty(groups.heads, groups.columns, device="meta")
    params = site_params(op, groups, product.rhs.shape, scale, is_weight=is_weight)
    return params.scale.shape, params.axis


def weights_fingerprint(prepared: GraphModule) -> str:
    """Return a short hash of the values of a model's parameters and buffers, in order."""
    return fingerprint_tensors(prepared.state_dict().values())


def check_weights(prepared: GraphModule, calibration: Calibration, operation: str) -> None:
    """Raise PTQError if a calibration says that it is of other weights; one made by hand may say nothing."""
    theirs = calibration.provenance.get(WEIGHTS_FINGERPRINT)
    if theirs is None:
        return
    mine = weights_fingerprint(prepared)
    if theirs != mine:
        do = "load the weights that were calibrated, or calibrate these"
        expected, got = f"a calibration of these weights ({mine})", f"one of others ({quoted(theirs)})"
        raise failure(operation, "calibration", expected=expected, got=got, do=do)
