"""Which twins are worth their second product: exact where the distance pays for the time, uniform elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.fx import GraphModule

from ptq4vit_fx.api import calibrate
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.export.proof.product_timing import ProductShapes, measure_product
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.names import OPERANDS, Site, site
from ptq4vit_fx.passes.graph.contract import calibration_of, plan_of
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.traced_module import TracedModule
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.quantizers import TwinUniform
from ptq4vit_fx.torch_state import independent_of_caller
from ptq4vit_fx.tuning.allocation import Option, allocate
from ptq4vit_fx.tuning.form_search import planned
from ptq4vit_fx.tuning.forms import EXACT, UNIFORM, Pair, plan_with, uniform_in_place_of
from ptq4vit_fx.tuning.mixing import mixed_calibration, product_shapes, with_calibration

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

    Every product with a twin is searched once more with uniform quantizers. Those become uniform that save most time
    while together they add no more than `tolerance` times the distance of the whole model, the sum of
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
    shapes = product_shapes(prepared)
    pairs = {op.name: _uniform(op, plan, shapes[op.name]) for op in ops}
    searched = calibrate(planned(prepared, plan_with(plan, pairs)), batches, **calibrate_kwargs)
    total = sum(after for _, after in calibration.distances.values())
    example_batch = shape_of(next(n for n in prepared.graph.nodes if n.op == "placeholder"))[0]
    timed = {key: timing(key) for key in dict.fromkeys(shapes[op.name] for op in ops)}
    choices = [
        TwinChoice(
            op.name,
            tuple(key for key in _sites(op) if isinstance(plan.quantizers[key], TwinUniform)),
            calibration.distances[op.name][1],
            searched.distances[op.name][1],
            tuple(seconds / example_batch for seconds in timed[shapes[op.name]]),
            "twin",
        )
        for op in ops
    ]
    names = _cheapest(choices, tolerance * total) if uniform is None else _matching(uniform, choices)
    report = TwinReport(tuple(replace(c, chosen="uniform") if c.op in names else c for c in choices), total)
    forms = {op.name: UNIFORM if op.name in names else EXACT for op in plan.ops}
    merged = mixed_calibration(plan, {EXACT: calibration, UNIFORM: searched}, forms, {"uniform_twins": sorted(names)})
    return with_calibration(prepared, merged), report


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


def _uniform(op: QuantOp, plan: QuantPlan, shapes: ProductShapes) -> Pair:
    """Return the quantizers of both operands, uniform ones in the place of twins."""
    lhs, rhs = (
        uniform_in_place_of(own, per_head=op.kind == "matmul" and len(shape) == 4)
        if isinstance(own := plan.quantizers[key], TwinUniform)
        else own
        for key, shape in zip(_sites(op), (shapes.lhs, shapes.rhs), strict=True)
    )
    return lhs, rhs


def _cheapest(choices: list[TwinChoice], allowed: float) -> set[str]:
    """Return the products that save most together, as long as together they add no more than `allowed`."""
    options = {
        choice.op: [Option("twin", 0.0, choice.seconds[0]), Option("uniform", choice.added, choice.seconds[1])]
        for choice in choices
        if choice.saved > 0
    }
    chosen = allocate(options, cost=allowed)
    return {name for name, form in (chosen or {}).items() if form == "uniform"}


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
