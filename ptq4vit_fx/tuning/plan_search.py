"""The search for the cheapest plan that holds: plans are solved for sums of costs, and measured as wholes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ptq4vit_fx.errors import failure
from ptq4vit_fx.tuning.allocation import Option, allocate
from ptq4vit_fx.tuning.budget import Budget
from ptq4vit_fx.tuning.forms import FLOAT, Form, form_of
from ptq4vit_fx.tuning.frontier import Point
from ptq4vit_fx.tuning.measuring import divergence
from ptq4vit_fx.tuning.study import Study

#: Plans that are measured as a whole, at most, beside those of one form and the two ends.
ROUNDS = 8
#: Two sums of costs this close allow the same plans, or nearly.
RESOLVED = 1.05
#: The part of the finest quantized plan's cost that products may have together where most must stay float.
ALMOST_FLOAT = 1e-3
TINY = 1e-12
#: A sum of costs that is off by more than this factor has products measured that were only predicted; so many at once.
OFF, MEASURED_AT_ONCE = 1.3, 8


@dataclass
class PlanSearch:
    """Plans that were measured, and the search for the one that takes least of those that hold.

    takes: product -> form -> what it takes. points: by what each product is. float_right: top-1 of float, with labels.
    """

    known: Study
    takes: dict[str, dict[Form, float]]
    budget: Budget
    points: dict[tuple[tuple[str, str], ...], Point] = field(default_factory=dict)
    float_right: float | None = None

    def run(self) -> Point:
        """Return the chosen point; raises PTQError if none holds.

        Where the plan that takes least of all holds, that is it, and no product is measured alone. Else the sum of
        costs that a plan may have is searched between that of the cheapest plan and that of the finest one that has no
        product in float, or next to nothing where even that does not hold, by halving its logarithm.
        """
        if self.known.measuring.labels is not None:
            self.float_right = self.known.measuring.right()
        if self.budget.limit is not None:
            self._measure_all()
            return self._within(self.budget.limit)
        own = [
            self._point({name: self.known.candidates.as_form(name, form) for name in self.takes}, form.name)
            for form in self.known.found
        ]
        self.budget = self.budget.beside(own[0])
        cheapest = self._point(self._cheapest(), "tuned")
        if not self.budget.holds(cheapest):
            self._measure_all()
            high, low = (max(self._sum(forms), TINY) for forms in (self._cheapest(), self._finest()))
            if not self.budget.holds(self._try(low)):
                low *= ALMOST_FLOAT
            for _ in range(ROUNDS):
                if high <= RESOLVED * low:
                    break
                middle = math.sqrt(low * high)
                holds = self.budget.holds(self._try(middle))
                low, high = (middle, high) if holds else (low, middle)
        return self._best()

    def _measure_all(self) -> None:
        """Have products measured alone, and say anew what these plans were expected to be."""
        self.known.measure_all()
        for key, point in self.points.items():
            forms = {name: form_of(form) for name, form in point.forms.items()}
            self.points[key] = replace(point, predicted=self._sum(forms))

    def _best(self) -> Point:
        held = [point for point in self.points.values() if self.budget.holds(point)]
        if not held:
            best = max(self.points.values(), key=lambda p: (p.score, -p.divergence))
            got = f"{best.score:.2%}, KL {best.divergence:.3g}, at best"
            do = "allow more, add forms of more bits, or leave the model in float"
            raise failure("tune", "budget", expected=f"a quantized model with {self.budget}", got=got, do=do)
        return min(held, key=lambda p: (p.takes, p.divergence, p.name))

    def _within(self, limit: float) -> Point:
        choice = allocate(self._options(), takes=limit)
        if choice is None:
            least = sum(min(own.values()) for own in self.takes.values())
            do = f"allow {least:.3g} or more"
            raise failure("tune", "limit", expected="what some plan takes", got=f"{limit:g}", do=do)
        return self._point({name: form_of(form) for name, form in choice.items()}, "tuned")

    def _try(self, allowed: float) -> Point:
        """Return the plan that takes least at this sum of costs, measured; where the sum is off, with more measured."""
        for _ in range(2):
            choice = allocate(self._options(), cost=allowed)
            forms = self._finest() if choice is None else {name: form_of(form) for name, form in choice.items()}
            point = self._point(forms, "tuned")
            if not self._off(point) or not (unknown := self._unmeasured(point)):
                break
            self.known.measure(unknown)
        return point

    def _off(self, point: Point) -> bool:
        return point.divergence > OFF * point.predicted or point.predicted > OFF * point.divergence

    def _unmeasured(self, point: Point) -> list[tuple[str, str]]:
        """Return products that were only predicted, and could be another form than they are in this plan."""
        costs = [
            c
            for c in self.known.sensitivity.worst()
            if point.forms.get(c.product) == c.form and len(self.takes[c.product]) > 1
        ]
        return [(c.product, c.form) for c in costs if c.measured is None][:MEASURED_AT_ONCE]

    def _options(self) -> dict[str, list[Option]]:
        costs = self.known.sensitivity
        return {
            name: [Option(form.name, costs.of(name, form), taken) for form, taken in own.items()]
            for name, own in self.takes.items()
        }

    def _sum(self, forms: Mapping[str, Form]) -> float:
        return sum(self.known.sensitivity.of(name, form) for name, form in forms.items())

    def _cheapest(self) -> dict[str, Form]:
        return {name: min(own, key=lambda form: own[form]) for name, own in self.takes.items()}

    def _finest(self) -> dict[str, Form]:
        costs = self.known.sensitivity
        quantized = {name: [form for form in own if form != FLOAT] for name, own in self.takes.items()}
        return {name: min(own, key=lambda form: costs.of(name, form)) for name, own in quantized.items()}

    def _point(self, forms: Mapping[str, Form], name: str) -> Point:
        """Return a plan measured as a whole, once."""
        key = tuple(sorted((product, form.name) for product, form in forms.items()))
        if key not in self.points:
            calibrations = {product: self.known.found[form] for product, form in forms.items() if form != FLOAT}
            against = self.known.measuring.whole(calibrations)
            right = None if self.float_right is None else self.known.measuring.right(calibrations)
            drop = None if right is None or self.float_right is None else self.float_right - right
            taken = sum(self.takes[product][form] for product, form in forms.items())
            chosen = {product: form.name for product, form in forms.items()}
            self.points[key] = Point(name, chosen, taken, self._sum(forms), divergence(against), against, drop)
        return self.points[key]
