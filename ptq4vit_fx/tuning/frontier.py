"""What a plan takes against how good it is: the points that were measured, as a table and as a picture."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq4vit_fx.errors import check_extra, printable
from ptq4vit_fx.export.proof.against_float import AgainstFloat
from ptq4vit_fx.files import write_file
from ptq4vit_fx.tuning.gains import UNITS, Quantity, told


@dataclass(frozen=True)
class Point:
    """A plan, measured as a whole on images that calibration has not seen.

    name: of a plan of one form, else "tuned". forms: product -> form. takes: the sum of what is to be small. predicted:
    the sum of the costs of the products. divergence: of the whole. against: every other figure. drop: of top-1 against
    float, in shares, where there are labels.
    """

    name: str
    forms: Mapping[str, str]
    takes: float
    predicted: float
    divergence: float
    against: AgainstFloat
    drop: float | None = None

    @property
    def score(self) -> float:
        """The share of the same classes, or what `AgainstFloat.score` takes in its place."""
        return self.against.score

    def counts(self) -> dict[str, int]:
        """Return form -> how many products have it, the most frequent first."""
        return dict(sorted(Counter(self.forms.values()).items(), key=lambda item: (-item[1], item[0])))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, JSON-ready."""
        share = self.against.same_class
        return {
            "name": self.name,
            "forms": self.counts(),
            "takes": self.takes,
            "predicted": self.predicted,
            "divergence": self.divergence,
            "agreement": self.score,
            "interval": None if share is None else list(share.interval),
            "top1_drop": self.drop,
        }


def table(points: Sequence[Point], quantity: Quantity, chosen: Point | None) -> str:
    """Return the points, what takes least first; the chosen one is marked."""
    _, unit = UNITS[quantity]
    lines = [f"{'':2}{unit:>24}{'predicted KL':>14}{'measured':>10}{'agreement':>11}  forms"]
    for point in sorted(points, key=lambda p: (p.takes, -p.score, p.name)):
        factor, _ = UNITS[quantity]
        forms = ", ".join(f"{count} {name}" for name, count in point.counts().items())
        figures = f"{factor * point.takes:24.4g}{point.predicted:14.3g}{point.divergence:10.3g}{point.score:11.2%}"
        drop = "" if point.drop is None else f", top-1 {-100 * point.drop:+.2f} points"
        lines.append(f"{'> ' if point is chosen else '  '}{figures}  {forms}{drop}")
    return printable("\n".join(lines), keep="\n")


def draw(points: Sequence[Point], quantity: Quantity, chosen: Point | None, path: str | os.PathLike[str]) -> None:
    """Write a picture of the points, PNG: what they take against how much agrees with float, and against the KL.

    Raises PTQError without matplotlib, which the extra `report` brings.
    """
    check_extra("tune", "the picture", "report", "matplotlib")
    from matplotlib.figure import Figure

    factor, unit = UNITS[quantity]
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: tuple[tuple[Any, str, Callable[[Point], float]], ...] = (
        (figure.add_subplot(1, 2, 1), "agreement with float, %", lambda point: 100 * point.score),
        (figure.add_subplot(1, 2, 2), "KL from float, nats", lambda point: point.divergence),
    )
    tuned = sorted((p for p in points if p.name == "tuned"), key=lambda p: (p.takes, p.score))
    uniform = [p for p in points if p.name != "tuned"]
    for axes, label, height in panels:
        axes.plot([factor * p.takes for p in tuned], [height(p) for p in tuned], "o-", label="tuned")
        axes.plot([factor * p.takes for p in uniform], [height(p) for p in uniform], "s", label="one form")
        for point in uniform:
            place = (factor * point.takes, height(point))
            axes.annotate(point.name, place, xytext=(4, 4), textcoords="offset points")
        if chosen is not None:
            label_of_chosen = told(chosen.takes, quantity)
            axes.plot([factor * chosen.takes], [height(chosen)], "*", markersize=16, label=label_of_chosen)
        axes.set(xlabel=unit, ylabel=label)
        axes.legend()
    if all(point.divergence > 0 for point in points):
        panels[1][0].set_yscale("log")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_file(path, picture.getvalue(), "save picture")
