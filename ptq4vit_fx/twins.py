"""Which twins are worth their second product: exact where the model would lose by less, uniform elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import GraphModule

from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.names import OPERANDS, Site, site
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.traced_module import TracedModule
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.quantizers import TwinUniform
from ptq4vit_fx.torch_state import independent_of_caller
from ptq4vit_fx.tuning.form_search import search_forms
from ptq4vit_fx.tuning.forms import EXACT, UNIFORM, Form, candidates_of
from ptq4vit_fx.tuning.mixing import mixed_calibration, with_calibration
from ptq4vit_fx.tuning.sensitivity import Sensitivity, predicted
from ptq4vit_fx.tuning.study import check_distances
from ptq4vit_fx.tuning.tune import tune

#: What uniform quantizers in the place of twins may add to the divergence from float, in nats, by default: top-1 of
#: 5,000 images did not tell five times as much (`vit_s14` with uniform quantizers alone, docs/transforms.md).
KL_ADDED = 0.0005
#: Forward passes of 32 images that measuring single products may take.
PASSES = 8.0


@dataclass(frozen=True)
class TwinChoice:
    """One product with a twin, beside the same product with a uniform quantizer in the twin's place.

    twin, uniform: what the product costs alone, the divergence of the output in nats, measured or predicted by the
    distance of its search.
    """

    op: str
    sites: tuple[Site, ...]
    twin: float
    uniform: float
    chosen: Literal["twin", "uniform"]

    @property
    def added(self) -> float:
        """What the uniform quantizer adds; negative if it is the better one."""
        return self.uniform - self.twin


@dataclass(frozen=True)
class TwinReport:
    """Every product with a twin in the order of execution.

    multiplications: of one image with all twins exact, and as chosen. divergences: from float of the whole with all
    twins exact, and as chosen, in nats, measured; None where the choice was given.
    """

    choices: tuple[TwinChoice, ...]
    multiplications: tuple[float, float]
    divergences: tuple[float, float] | None = None

    def headline(self) -> str:
        """Return in a sentence how many twins became uniform, what that costs and what it saves."""
        uniform = sum(choice.chosen == "uniform" for choice in self.choices)
        exact, chosen = self.multiplications
        costs = ""
        if self.divergences is not None:
            costs = f"; KL from float {self.divergences[1]:.2g}, {self.divergences[0]:.2g} with all exact"
        return (
            f"{uniform} of {len(self.choices)} twins become uniform{costs}; "
            f"{exact / chosen:.2f} times fewer multiplications"
        )

    def __str__(self) -> str:
        lines = [f"{'product':40}{'exact costs':>13}{'uniform costs':>15}  chosen"]
        lines += [f"{c.op:40}{c.twin:13.3g}{c.uniform:15.3g}  {c.chosen}" for c in self.choices]
        return "\n".join([*lines, self.headline()])


@independent_of_caller()
def choose_twins(
    prepared: GraphModule,
    data: Any,
    *,
    uniform: Sequence[str] | None = None,
    held_out: Any = None,
    kl_added: float = KL_ADDED,
    images: int | None = None,
    **options: Any,
) -> tuple[TracedModule, TwinReport]:
    """Replace twins by uniform quantizers where the model hardly loses; return a calibrated model and the reasons.

    `tune` with two forms for each product that has a twin: the fewest multiplications with which the divergence from
    float is at most `kl_added` nats above that with all twins, or a tenth of that above it.

    prepared: of `prepare_fx`, its plan has twins; it is not changed, and need not be calibrated. data, held_out: as for
    `sensitivity`. uniform: names of products or regular expressions; these become uniform, whatever they cost, and no
    others, and all of `data`, or the first `images` of it, is calibrated on. options: of `tune` or `calibrate`; pass
    those that the model was calibrated with, and what is known of it is not searched again.
    Raises PTQError if the model has no twin, is to be searched without gradients, or if a pattern matches nothing; and
    as `tune` does.
    """
    ops = _twin_ops(prepared)
    if uniform is None:
        if images is not None:
            do = "pass the images to calibrate on as data, and others as held_out"
            raise failure("choose_twins", "images", expected="none without uniform=", got=str(images), do=do)
        budget: dict[str, Any] = {"kl_added": kl_added, "minimize": "multiplications"}
        tuned = tune(prepared, data, held_out=held_out, **budget, **{"passes": PASSES} | options)
        chosen = {name for name, form in tuned.point.forms.items() if form == UNIFORM.name}
        points = next(point for point in tuned.frontier if point.name == EXACT.name), tuned.point
        choices = _choices(plan_of(prepared), ops, tuned.sensitivity, chosen)
        report = TwinReport(choices, (points[0].takes, points[1].takes), (points[0].divergence, points[1].divergence))
        return tuned.prepared, report
    chosen = _matching(uniform, [op.name for op in ops])
    batches = batches_for(prepared, data, "choose_twins", images=images)
    candidates = candidates_of(prepared, (EXACT, UNIFORM))
    found = search_forms(prepared, batches, candidates, None, **options)
    forms: Mapping[str, Form] = {op.name: UNIFORM if op.name in chosen else EXACT for op in candidates.plan.ops}
    merged = mixed_calibration(candidates.plan, found, forms, {"uniform_twins": sorted(chosen)})
    costs = predicted(found, candidates, sum(len(batch[0]) for batch in batches))
    counts = {name: float(candidates.plan.multiplications.get(name, 0) or 1) for name in candidates.pairs}
    exact = sum(counts.values()) + sum(counts[op.name] for op in ops)
    report = TwinReport(
        _choices(candidates.plan, ops, costs, chosen), (exact, exact - sum(counts[name] for name in chosen))
    )
    return with_calibration(prepared, merged), report


def products_with_twins(plan: QuantPlan) -> tuple[QuantOp, ...]:
    """Return the products of a plan that have a twin, in the order of execution."""
    return tuple(op for op in plan.ops if any(isinstance(plan.quantizers[key], TwinUniform) for key in _sites(op)))


def _choices(plan: QuantPlan, ops: Sequence[QuantOp], costs: Sensitivity, chosen: set[str]) -> tuple[TwinChoice, ...]:
    return tuple(
        TwinChoice(
            op.name,
            tuple(key for key in _sites(op) if isinstance(plan.quantizers[key], TwinUniform)),
            costs.of(op.name, EXACT),
            costs.of(op.name, UNIFORM),
            "uniform" if op.name in chosen else "twin",
        )
        for op in ops
    )


def _twin_ops(prepared: GraphModule) -> tuple[QuantOp, ...]:
    """Return the products with a twin; raises PTQError as `choose_twins` says."""
    if not hasattr(prepared, "plan"):
        do = "call prepare_fx first"
        raise failure("choose_twins", "model", expected="a prepared model", got="one without a plan", do=do)
    ops = products_with_twins(plan_of(prepared))
    if not ops:
        do = "prepare with recipes.best()"
        raise failure("choose_twins", "plan", expected="at least one twin", got="none", do=do)
    check_distances(prepared, "choose_twins")
    return ops


def _sites(op: QuantOp) -> list[Site]:
    return [site(op.name, operand) for operand in OPERANDS]


def _matching(patterns: Sequence[str], names: list[str]) -> set[str]:
    found = set()
    for pattern in patterns:
        matched = {name for name in names if re.fullmatch(pattern, name)}
        if not matched:
            do = f"near names: {near_names(pattern, names)}"
            raise failure("choose_twins", repr(pattern), expected="a product with a twin", got="no match", do=do)
        found |= matched
    return found
