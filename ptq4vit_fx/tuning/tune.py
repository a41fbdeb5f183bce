"""`tune`: say how good it must be, get the plan that takes the least time, bytes or bits, measured as a whole."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import PTQError, failure, printable
from ptq4vit_fx.export.proof.against_float import Kind
from ptq4vit_fx.inputs.progress import Show
from ptq4vit_fx.passes.graph.contract import calibration_of, plan_of
from ptq4vit_fx.passes.graph.shapes import EXAMPLE_BATCH
from ptq4vit_fx.passes.graph.traced_module import TracedModule
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.torch_state import independent_of_caller
from ptq4vit_fx.tuning.budget import Budget, budget_of, warn_of_few
from ptq4vit_fx.tuning.forms import FLOAT, default_forms, form_of, held_forms
from ptq4vit_fx.tuning.frontier import Point, draw, table
from ptq4vit_fx.tuning.gains import Quantity, check_quantity, takes_of, told
from ptq4vit_fx.tuning.mixing import mixed_calibration, product_shapes, with_calibration
from ptq4vit_fx.tuning.plan_search import PlanSearch
from ptq4vit_fx.tuning.sensitivity import DEFAULT_PASSES, Sensitivity
from ptq4vit_fx.tuning.study import split_images, study, target_of
from ptq4vit_fx.tuning.timings import Timings, at_batch, load_timings, measure_timings


@dataclass(frozen=True)
class Tuned:
    """What `tune` found: a calibrated model, and every plan that was measured on the way.

    prepared: ready for `convert_fx`. point: the chosen plan as it was measured. frontier: all of them, what takes least
    first. sensitivity: the costs that they were made from. budget, minimize: what was asked for. timings: what seconds
    are of, None of other quantities. images: that were measured on.
    """

    prepared: TracedModule
    point: Point
    frontier: tuple[Point, ...]
    sensitivity: Sensitivity
    budget: Budget
    minimize: Quantity
    images: int
    timings: Timings | None = None
    notes: tuple[str, ...] = ()

    @property
    def plan(self) -> QuantPlan:
        """The plan of the chosen model."""
        return plan_of(self.prepared)

    @property
    def calibration(self) -> Calibration:
        """The scales of the chosen model."""
        calibration = calibration_of(self.prepared)
        assert calibration is not None
        return calibration

    def report(self) -> str:
        """Return what was decided and why, with the table of the frontier."""
        forms = ", ".join(f"{count} {name}" for name, count in self.point.counts().items())
        agreed = self.point.against.headline()
        lines = [
            f"asked for {self.budget}, the least {self.minimize}: {told(self.point.takes, self.minimize)}",
            f"{forms}; average bits: {self.plan.average_bits()}",
            f"on {self.images} images that calibration has not seen: {agreed}, KL {self.point.divergence:.3g}, "
            f"{self.point.predicted:.3g} by the sum of its products",
            self.sensitivity.headline(),
            *([f"timings of {self.timings.machine}, {self.timings.runtime}"] if self.timings else []),
            *self.notes,
            table(self.frontier, self.minimize, self.point),
        ]
        return printable("\n".join(lines), keep="\n")

    def __str__(self) -> str:
        return self.report()

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the frontier, PNG."""
        draw(self.frontier, self.minimize, self.point, path)

    def to_dict(self) -> dict[str, Any]:
        """Return every figure, JSON-ready."""
        return {
            "budget": self.budget.facts(),
            "minimize": self.minimize,
            "chosen": self.point.to_dict(),
            "forms": dict(self.point.forms),
            "frontier": [point.to_dict() for point in self.frontier],
            "sensitivity": self.sensitivity.to_dict(),
            "timings": None if self.timings is None else self.timings.facts(),
            "images": self.images,
            "notes": list(self.notes),
        }


@independent_of_caller()
def tune(
    prepared: GraphModule,
    data: Any,
    *,
    held_out: Any = None,
    labels: Any = None,
    target: str = "onnxruntime",
    agreement: float | None = None,
    kl: float | None = None,
    top1_drop: float | None = None,
    minimize: str = "time",
    limit: float | None = None,
    kl_added: float | None = None,
    forms: Sequence[str] | None = None,
    timings: Timings | str | os.PathLike[str] | None = None,
    batch: int | None = None,
    opset: int = 20,
    kind: Kind | None = None,
    passes: float = DEFAULT_PASSES,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | Show = True,
    **calibrate_kwargs: Any,
) -> Tuned:
    """Give every product the form with which the model is as good as asked for and takes the least.

    prepared: of `prepare_fx`; it is not changed, and need not be calibrated. data, held_out: as for `sensitivity`.
    agreement, kl, top1_drop (with labels, of `held_out`, or of `data` without it): what must hold on the images that
    are held out; or kl_added: a KL of so much more than that of every product in the first form, or of a tenth more;
    or limit: the most that may be taken (seconds per image, bytes, bits), the best within it is chosen. minimize:
    "time" of the products in the runtime of `target`, "size" of the weights, "average bits", or "multiplications", of
    which exact twins take two and which depend on no machine: they choose between the twins of the plan and uniform
    ones. forms: what a product may be, as for `sensitivity`; by default what `minimize` can gain from. timings: of
    `ptq4vit timings`, or their file; by default the products are timed here, `batch` images at a time. cache: a folder;
    interrupted work goes on from there. The other arguments are those of `calibrate`.

    Costs are divergences of single products, which add up as long as they are small; so plans are measured as wholes,
    and the sum that is allowed is halved or raised until the cheapest plan that holds is found. The same images,
    timings and arguments give the same plan. Raises PTQError if nothing that is quantized holds, and as `sensitivity`.
    """
    quantity, rules = check_quantity(minimize), target_of(target, "tune")
    images = split_images(prepared, data, held_out, labels, "tune")
    budget = budget_of(agreement, kl, top1_drop, limit, kl_added, images.labels)
    chosen = default_forms(quantity, rules) if forms is None else tuple(form_of(name) for name in forms)
    read = load_timings(timings) if isinstance(timings, (str, os.PathLike)) else timings
    _check_timings(read, quantity, target)
    known = study(
        prepared,
        images,
        held_forms(chosen, rules),
        passes=passes,
        kind=kind,
        cache=cache,
        progress=progress,
        choices_only=True,
        **calibrate_kwargs,
    )
    warn_of_few(budget, known.measuring.images)
    first = next(iter(known.found.values()))
    shapes = product_shapes(with_calibration(known.prepared, first))
    example = int(known.prepared.meta[EXAMPLE_BATCH])
    count = batch or (read.images if read is not None else example)
    shapes = at_batch(shapes, example, count)
    if quantity == "time" and read is None:
        timed = (shapes[name] for name in known.candidates.pairs if shapes[name].kind != "conv2d")
        read = measure_timings(timed, target, count)
    takes = takes_of(known.candidates, quantity, shapes, rules, opset, read)
    search = PlanSearch(known, takes, budget)
    point = search.run()
    notes = _notes(point, search, quantity, read)
    return _tuned(search, point, quantity, read if quantity == "time" else None, notes)


def _check_timings(timings: Timings | None, quantity: Quantity, target: str) -> None:
    if timings is not None and quantity == "time" and timings.target != target:
        do = f"measure them with `ptq4vit timings MODEL --target {target}`"
        raise failure("tune", "timings", expected=f"timings of target {target}", got=timings.target, do=do)


def _notes(point: Point, search: PlanSearch, quantity: Quantity, timings: Timings | None) -> tuple[str, ...]:
    """Return what a reader should know of the plan beside its figures."""
    notes = []
    if timings is not None and quantity == "time" and timings.elsewhere:
        notes.append(f"the timings are of another machine or runtime: {timings.machine}, {timings.runtime}")
    in_float = sum(own.get(FLOAT, math.inf) for own in search.takes.values())
    if in_float <= point.takes:
        notes.append(f"nothing pays: in float the model takes {told(in_float, quantity)}, no more than quantized")
    return tuple(notes)


def _tuned(
    search: PlanSearch, point: Point, quantity: Quantity, timings: Timings | None, notes: tuple[str, ...]
) -> Tuned:
    known = search.known
    forms = {name: form_of(form) for name, form in point.forms.items()}
    frontier = tuple(sorted(search.points.values(), key=lambda p: (p.takes, -p.score, p.name)))
    facts = {
        "budget": search.budget.facts(),
        "minimize": quantity,
        "chosen": point.to_dict(),
        "frontier": [one.to_dict() for one in frontier],
        "images": known.measuring.images,
        "factor": known.sensitivity.factor,
        "correlation": known.sensitivity.correlation,
        "timings": None if timings is None else timings.facts(),
        "notes": list(notes),
    }
    try:
        calibration = mixed_calibration(known.candidates.plan, known.found, forms, {"tuned": facts})
    except PTQError as error:
        raise PTQError(f"{error}; {'; '.join(notes)}" if notes else str(error)) from error
    prepared = with_calibration(known.prepared, calibration)
    images = known.measuring.images
    budget = search.budget
    return Tuned(prepared, point, frontier, known.sensitivity, budget, quantity, images, timings, notes)
