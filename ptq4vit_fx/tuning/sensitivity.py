"""What each product costs in each form: predicted by the search, and measured where it matters."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import failure, printable
from ptq4vit_fx.files import write_file
from ptq4vit_fx.inputs.progress import Show, UnderWay, shown
from ptq4vit_fx.inputs.records import Place, read_as, read_json
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.tuning.forms import FLOAT, Candidates, Form, form_of
from ptq4vit_fx.tuning.measuring import PASS_IMAGES, Measuring

#: Forward passes of PASS_IMAGES images that measuring single products may take.
DEFAULT_PASSES = 20.0
FORMAT = "ptq4vit_fx sensitivity 1"
FILE = "sensitivity.json"
#: Single products are measured on so many images at least.
LEAST_IMAGES = 8
#: An SNR above this is that of an output which did not change.
MOST_DECIBEL = 200.0


@dataclass(frozen=True)
class Cost:
    """One product in one form, the rest of the model in float.

    distance: sum((dL/dout)^2 (out^ - out)^2) over the calibration images, as the search left it. snr: of the product's
    output in dB. predicted: what the distance lets one expect of the divergence. measured: that divergence, on images
    that calibration has not seen: the mean KL in nats of classes; None where it was not measured.
    """

    product: str
    form: str
    distance: float
    snr: float
    predicted: float
    measured: float | None = None

    @property
    def value(self) -> float:
        """What is known best: measured, else predicted."""
        return self.predicted if self.measured is None else self.measured


@dataclass(frozen=True)
class Sensitivity:
    """What every product costs in every form, in the order of execution; float costs nothing and has no record.

    factor: divergence per distance, by which the others are predicted. correlation: of ranks (Spearman) of distance and
    divergence where both are known; None of fewer than three. images: that were measured on. passes: forwards of
    PASS_IMAGES images that it took. identity: fingerprints of what it is of.
    """

    costs: tuple[Cost, ...]
    factor: float
    correlation: float | None
    images: int
    passes: float
    identity: dict[str, Any] = field(default_factory=dict)

    def of(self, product: str, form: Form) -> float:
        """Return the cost of a product in a form, that of float is 0; KeyError of what is not in the table."""
        if form == FLOAT:
            return 0.0
        for cost in self.costs:
            if (cost.product, cost.form) == (product, form.name):
                return cost.value
        raise KeyError(f"{product} {form.name}")

    def worst(self, most: int | None = None) -> tuple[Cost, ...]:
        """Return the costs, the largest first, of equal ones by name."""
        return tuple(sorted(self.costs, key=lambda cost: (-cost.value, cost.product, cost.form))[:most])

    def measured(self, found: Mapping[tuple[str, str], float], passes: float) -> Sensitivity:
        """Return this with more that was measured, (product, form) -> divergence; predictions follow.

        A form that was not measured is predicted by the product's forms that were, if there are any: distances of one
        product compare better than those of two, whose gradients say more or less of what an error does to the output.
        """
        costs = tuple(replace(c, measured=found.get((c.product, c.form), c.measured)) for c in self.costs)
        factor, correlation = _relation(costs, self.factor)
        own = {
            name: _relation([c for c in costs if c.product == name], factor)[0] for name in {c.product for c in costs}
        }
        costs = tuple(replace(c, predicted=own[c.product] * c.distance) for c in costs)
        return replace(self, costs=costs, factor=factor, correlation=correlation, passes=passes)

    def records(self) -> list[dict[str, Any]]:
        """Return a JSON-ready dictionary per product and form."""
        return [asdict(cost) for cost in self.costs]

    def to_frame(self) -> Any:
        """Return the records as a pandas DataFrame; raises PTQError where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            do = "install pandas, or take .records()"
            raise failure("Sensitivity.to_frame", "pandas", expected="it installed", got=str(error), do=do) from error
        return pandas.DataFrame(self.records())

    def to_dict(self) -> dict[str, Any]:
        """Return everything, JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'product':40}{'form':>14}{'distance':>11}{'SNR':>7}{'predicted':>11}{'measured':>11}"]
        for cost in self.costs:
            found = "" if cost.measured is None else f"{cost.measured:.3g}"
            row = (
                f"{cost.product:40}{cost.form:>14}{cost.distance:11.3g}{cost.snr:7.1f}{cost.predicted:11.3g}{found:>11}"
            )
            lines.append(row)
        return printable("\n".join([*lines, self.headline()]), keep="\n")

    def headline(self) -> str:
        """Return in a sentence how much was measured, and how well predictions agree with it."""
        count = sum(cost.measured is not None for cost in self.costs)
        if not count:
            return "no product was measured alone: the plan that takes least holds"
        told = (
            f"{count} of {len(self.costs)} costs measured on {self.images} images in {self.passes:.1f} forward passes"
        )
        if self.correlation is None:
            return f"{told} of {PASS_IMAGES}"
        return f"{told} of {PASS_IMAGES}; rank correlation with the predicted ones {self.correlation:.2f}"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the table into a folder, beside the calibrations of the forms."""
        text = json.dumps({"format": FORMAT} | self.to_dict(), indent=1)
        write_file(Path(folder) / FILE, text.encode(), "sensitivity")

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Sensitivity | None:
        """Read what `save` wrote, None if there is none; raises PTQError on anything else."""
        path = Path(folder) / FILE
        if not path.exists():
            return None
        place = Place("sensitivity", str(path), do="delete the file, it will be measured again")
        try:
            record = read_json(path.read_text(encoding="utf-8"), place)
        except (OSError, UnicodeDecodeError) as error:
            raise place.refusal("JSON", str(error)) from error
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise place.refusal(FORMAT, "another")
        found: Sensitivity = read_as(Sensitivity, record, place)
        return found


def predicted(found: Mapping[Form, Calibration], candidates: Candidates, images: int) -> Sensitivity:
    """Return what the searches say of every product and form; images: of the calibration."""
    costs = [
        Cost(name, form.name, own.distances[name][1], min(own.snr[name], MOST_DECIBEL), 0.0)
        for name, forms in candidates.pairs.items()
        for form in forms
        if form != FLOAT
        for own in [found[form]]
    ]
    factor = 1.0 / images
    return Sensitivity(tuple(replace(c, predicted=factor * c.distance) for c in costs), factor, None, 0, 0.0)


def measure(
    sensitivity: Sensitivity,
    measuring: Measuring,
    found: Mapping[Form, Calibration],
    *,
    passes: float = DEFAULT_PASSES,
    wanted: Iterable[tuple[str, str]] | None = None,
    among: Container[str] | None = None,
    progress: bool | Show = True,
) -> Sensitivity:
    """Return the table with costs measured, as many as these forward passes allow: each product once, then the dearest.

    wanted: these (product, form) instead, whatever they take. among: of these products alone, by default of all.
    """
    order = {op.name: place for place, op in enumerate(plan_of(measuring.observed).ops)}
    if wanted is None:
        costs = [cost for cost in sensitivity.costs if among is None or cost.product in among]
        chosen = _that_matter(costs, order, passes - measuring.passes, measuring.images)
    else:
        chosen = sorted(wanted, key=lambda pair: (order[pair[0]], pair[1]))
    tried: dict[str, list[str]] = {}
    for product, form in chosen:
        tried.setdefault(product, []).append(form)
    calibrations = {name: [found[form_of(form)] for form in forms] for name, forms in tried.items()}
    results: dict[tuple[str, str], float] = {}
    with _progress(len(chosen), progress) as tell:
        for name, values in measuring.alone(calibrations, tell):
            results |= {(name, form): value for form, value in zip(tried[name], values, strict=True)}
    return replace(sensitivity.measured(results, measuring.passes), images=measuring.images)


def images_that_fit(costs: Sequence[Cost], order: Mapping[str, int], passes: float, most: int) -> int:
    """Return how many images leave room to measure everything, from LEAST_IMAGES to `most`: few images tell more of
    every product than many of a part of them.
    """
    whole = 1 + sum(1 - order[cost.product] / len(order) for cost in costs)
    return max(min(most, LEAST_IMAGES), min(most, int(PASS_IMAGES * passes / whole)))


def _that_matter(costs: Iterable[Cost], order: Mapping[str, int], passes: float, images: int) -> list[tuple[str, str]]:
    """Return (product, form) in the order of execution, the most important ones that the passes allow.

    In front stands each product in the form of its largest distance. A gradient may vanish where an error does not
    (behind a softmax that is one-hot), so half of what decides then is how much of a product's output is noise.
    """
    listed = [cost for cost in costs if cost.measured is None]
    noise = {cost: 10.0 ** (-cost.snr / 10) for cost in listed}
    distances, noises = sum(cost.distance for cost in listed) or 1.0, sum(noise.values()) or 1.0
    largest: dict[str, Cost] = {}
    for cost in listed:
        if cost.product not in largest or cost.distance > largest[cost.product].distance:
            largest[cost.product] = cost

    def importance(cost: Cost) -> tuple[Any, ...]:
        score = cost.distance / distances + noise[cost] / noises
        return largest[cost.product] is not cost, -score, cost.product, cost.form

    left, chosen = passes - images / PASS_IMAGES, list[tuple[str, str]]()  # one to walk along
    for cost in sorted(listed, key=importance):
        price = images / PASS_IMAGES * (1 - order[cost.product] / len(order))
        if price <= left:
            left -= price
            chosen.append((cost.product, cost.form))
    return sorted(chosen, key=lambda pair: (order[pair[0]], pair[1]))


def _relation(costs: Iterable[Cost], before: float) -> tuple[float, float | None]:
    """Return divergence per distance, the median of what was measured, and the correlation of ranks.

    before: the factor where nothing that was measured tells another one.
    """
    both = [(c.distance, c.measured) for c in costs if c.measured is not None and c.distance > 0 and c.measured > 0]
    if not both:
        return before, None
    distances, measured = np.array(both).T
    factor = float(np.exp(np.median(np.log(measured / distances))))
    correlation = float(spearmanr(distances, measured).statistic) if len(both) > 2 else math.nan
    return factor, None if math.isnan(correlation) else correlation


@contextmanager
def _progress(total: int, progress: bool | Show) -> Iterator[Callable[[str, float], None]]:
    """Give what is told the product that is being measured, and which part of one measurement is done."""
    done = 0.0
    with shown(progress) as show:

        def tell(name: str, share: float) -> None:
            nonlocal done
            done += share
            show(UnderWay("measure products", round(done), total, "measurements", name))

        yield tell
