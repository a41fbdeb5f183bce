"""Which twins are worth their second product: exact where the distance pays for the time, uniform elsewhere."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch.fx import GraphModule, Node

from ptq4vit_fx.api import calibrate, load_calibration
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.export.proof.product_timing import ProductShapes, measure_product
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.names import OPERANDS, Site, product_of, site
from ptq4vit_fx.passes.graph.contract import attach, calibration_of, plan_of
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.traced_module import TracedModule
from ptq4vit_fx.pipeline import CONVERSION
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.quantizers import Quantizer, TwinUniform, Uniform
from ptq4vit_fx.torch_state import independent_of_caller

#: How much `auto` may add to the distance of the whole model: a tenth of a loss that is small to begin with.
DEFAULT_TOLERANCE = 0.1


@dataclass(frozen=True)
class TwinChoice:
    """One product with a twin, beside the same product with a uniform quantizer in the twin's place.

    twin, uniform: distance of the product, sum((dL/dout)^2 (out^ - out)^2). seconds: of the two integer products of the
    twin, and of the one of the uniform quantizer, per image, on this machine.
    """

    op: str
    sites: tuple[Site, ...]
    twin: float
    uniform: float
    seconds: tuple[float, ...]
    chosen: Literal["twin", "uniform"]

    @property
    def added(self) -> float:
        """The distance that the uniform quantizer adds; negative if it is the better one."""
        return self.uniform - self.twin

    @property
    def saved(self) -> float:
        """The seconds per image that it saves."""
        return self.seconds[0] - self.seconds[1]


@dataclass(frozen=True)
class TwinReport:
    """Every product with a twin in the order of execution; total: the distance of all products, all twins exact."""

    choices: tuple[TwinChoice, ...]
    total: float

    @property
    def added(self) -> float:
        """What the chosen uniform quantizers add, as a part of `total`."""
        return sum(choice.added for choice in self.choices if choice.chosen == "uniform") / self.total

    def __str__(self) -> str:
        uniform = [choice for choice in self.choices if choice.chosen == "uniform"]
        saved, possible = sum(choice.saved for choice in uniform), sum(choice.saved for choice in self.choices)
        lines = [f"{'product':40}{'uniform adds':>14}{'saves':>12}  chosen"]
        lines += [
            f"{choice.op:40}{choice.added / self.total:13.3%} {1e3 * choice.saved:9.3f} ms  {choice.chosen}"
            for choice in self.choices
        ]
        return "\n".join(
            [
                *lines,
                f"{len(uniform)} of {len(self.choices)} twins become uniform: the model's distance grows by "
                f"{self.added:.2%}, {1e3 * saved:.2f} of {1e3 * possible:.2f} ms per image are saved",
            ]
        )


@independent_of_caller()
def choose_twins(
    prepared: GraphModule,
    data: Any,
    *,
    uniform: Sequence[str] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    images: int | None = None,
    timing: Callable[[ProductShapes], tuple[float, float]] = measure_product,
    **calibrate_kwargs: Any,
) -> tuple[TracedModule, TwinReport]:
    """Replace twins by uniform quantizers where that costs little and saves time; return a new model and the reasons.

    Every product with a twin is searched once more with uniform quantizers. Those that add least per second saved
    become uniform, until together they add `tolerance` times the distance of the whole model, the sum of
    sum((dL/dout)^2 (out^ - out)^2) over all products: to second order, that is the loss that quantization causes.

    prepared: a calibrated model whose plan has twins; it is not changed. data, images: what it was calibrated on.
    uniform: names of products or regular expressions; these become uniform, whatever they add, and no others.
    tolerance: >= 0. timing: seconds of a product as two branches and as one; the default measures them in ONNX
    Runtime, so the choice is this machine's. The other arguments are those of `calibrate`; pass the same ones.
    Raises PTQError if the model is not calibrated, has no twin, was searched without gradients, or if a pattern matches
    nothing.
    """
    plan, calibration, ops = _twin_ops(prepared)
    batches = batches_for(prepared, data, "choose_twins", images=images)
    shapes = _product_shapes(prepared)
    alternatives = {key: value for op in ops for key, value in _uniform(op, plan, shapes[op.name]).items()}
    reduced = replace(plan, ops=ops, quantizers=_of(ops, plan.quantizers | alternatives))
    result = attach(copy.deepcopy(prepared), plan=reduced)
    searched = calibrate(result, batches, **calibrate_kwargs)
    total = sum(after for _, after in calibration.distances.values())
    example_batch = shape_of(next(n for n in prepared.graph.nodes if n.op == "placeholder"))[0]
    timed = {key: timing(key) for key in dict.fromkeys(shapes[op.name] for op in ops)}
    choices = [
        TwinChoice(
            op.name,
            tuple(key for key in _sites(op) if key in alternatives),
            calibration.distances[op.name][1],
            searched.distances[op.name][1],
            tuple(seconds / example_batch for seconds in timed[shapes[op.name]]),
            "twin",
        )
        for op in ops
    ]
    names = _cheapest(choices, tolerance * total) if uniform is None else _matching(uniform, choices)
    report = TwinReport(tuple(replace(c, chosen="uniform") if c.op in names else c for c in choices), total)
    changed = tuple(op for op in ops if op.name in names)
    merged = replace(
        calibration,
        plan=replace(plan, quantizers=plan.quantizers | _of(changed, reduced.quantizers)),
        params=calibration.params | _of(changed, searched.params),
        distances=calibration.distances | {op.name: searched.distances[op.name] for op in changed},
        snr=calibration.snr | {key: searched.snr[key] for op in changed for key in (*_sites(op), op.name)},
        provenance=calibration.provenance | {"uniform_twins": sorted(names)},
        codes={key: x for key, x in calibration.codes.items() if product_of(key) not in names}
        | {key: x for key, x in searched.codes.items() if product_of(key) in names},
    )
    return load_calibration(attach(result, plan=merged.plan), merged), report


def _twin_ops(prepared: GraphModule) -> tuple[QuantPlan, Calibration, tuple[QuantOp, ...]]:
    """Return the plan, the calibration and the products with a twin; raises PTQError as `choose_twins` says."""
    calibration = calibration_of(prepared) if hasattr(prepared, "plan") else None
    if calibration is None:
        do = "call prepare_fx and calibrate first"
        raise failure("choose_twins", "model", expected="a calibrated model", got="one without scales", do=do)
    plan = plan_of(prepared)
    ops = tuple(op for op in plan.ops if any(isinstance(plan.quantizers[key], TwinUniform) for key in _sites(op)))
    if not ops:
        do = "prepare with recipes.ptq4vit()"
        raise failure("choose_twins", "plan", expected="at least one twin", got="none", do=do)
    metrics = {search.metric for search in plan.searches.values()}
    if metrics != {"hessian"}:
        do = "calibrate with the metric hessian"
        got = ", ".join(sorted(metrics))
        raise failure("choose_twins", "plan", expected="distances that compare products", got=got, do=do)
    lacking = next((op.name for op in plan.ops if op.name not in calibration.distances), None)
    if lacking is not None:
        do = "calibrate again"
        raise failure("choose_twins", lacking, expected="the distance of its search", got="none", do=do)
    return plan, calibration, ops


def _sites(op: QuantOp) -> list[Site]:
    return [site(op.name, operand) for operand in OPERANDS]


def _of(ops: Iterable[QuantOp], values: dict[Site, Any]) -> dict[Site, Any]:
    return {key: values[key] for op in ops for key in _sites(op)}


def _product_shapes(prepared: GraphModule) -> dict[str, ProductShapes]:
    """Return op name -> shapes of its operands at the example input, as the converted model will have them."""
    simulated = CONVERSION.until("narrow_tokens").run(copy.deepcopy(prepared))
    found = {}
    for node, name in planned_products(simulated.graph):
        op = plan_of(prepared).op(name)
        lhs, rhs = (shape_of(cast("Node", operand)) for operand in node.args[:2])
        found[name] = ProductShapes(op.kind, lhs, rhs, op.rhs_is_weight)
    return found


def _uniform(op: QuantOp, plan: QuantPlan, shapes: ProductShapes) -> dict[Site, Quantizer]:
    """Return the uniform quantizer of each operand that has a twin."""
    return {
        key: uniform_in_place_of(twin, per_head=op.kind == "matmul" and len(shape) == 4)
        for key, shape in zip(_sites(op), (shapes.lhs, shapes.rhs), strict=True)
        if isinstance(twin := plan.quantizers[key], TwinUniform)
    }


def uniform_in_place_of(twin: TwinUniform, *, per_head: bool) -> Uniform:
    """Return a uniform quantizer of as many bits, no code of which is wasted below the lowest value."""
    if twin.form == "gelu":
        return Uniform(twin.bits, signed=False, minimum=twin.minimum)
    return Uniform(twin.bits, signed=False, granularity="head" if per_head else "tensor")


def _cheapest(choices: list[TwinChoice], allowed: float) -> set[str]:
    """Return the products that add least per second saved, as long as together they add no more than `allowed`."""
    saving = sorted((c for c in choices if c.saved > 0), key=lambda c: c.added / c.saved)
    names, added = set(), 0.0
    for choice in saving:
        if added + choice.added <= allowed:
            names.add(choice.op)
            added += choice.added
    return names


def _matching(patterns: Sequence[str], choices: list[TwinChoice]) -> set[str]:
    names = [choice.op for choice in choices]
    found = set()
    for pattern in patterns:
        matched = {name for name in names if re.fullmatch(pattern, name)}
        if not matched:
            do = f"near names: {near_names(pattern, names)}"
            raise failure("choose_twins", repr(pattern), expected="a product with a twin", got="no match", do=do)
        found |= matched
    return found
