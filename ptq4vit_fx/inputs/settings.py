"""How scales are searched, and what is changed in front of the search: the parts of a recipe beside its quantizers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ptq4vit_fx.errors import failure, unknown_name

#: The distances that a search knows (search/metrics.py).
METRICS = ("hessian", "mse", "l1", "cosine", "pearson")
#: The losses by name that calibrate knows (calibrating/losses.py); the first one is the paper's.
LOSSES = ("pseudo_label", "fisher", "projection")
#: How weights become codes: each value by itself, or by the Gram matrix of the inputs (search/rounding.py).
Rounding = Literal["nearest", "gram"]


@dataclass(frozen=True)
class SearchSettings:
    """How scales are searched (PTQ4ViT, section 4 and Algorithm 1).

    metric: hessian, mse, cosine, l1 or pearson. Candidates are alpha + (beta - alpha) * i / n, i = 1 .. n, times
    the initial scale; a candidate of zero is left out. rounds: times that rhs and lhs are searched in turn.
    max_shift: thresholds tried for a softmax twin are 2^-0 .. 2^-max_shift.

    screen_rows: candidates are screened on about this many rows of an op, drawn by their share in the distance (a
    quarter or the double, as that is concentrated), and the best few (`confirm`) are decided on all rows; None
    evaluates every candidate on all rows.

    rounding: of weights, once the scales are chosen; "gram" lets each value make up for the errors of those before it,
    where that brings the product nearer, and the codes become part of the calibration.
    """

    metric: str = "hessian"
    alpha: float = 0.0
    beta: float = 1.2
    n: int = 100
    rounds: int = 3
    max_shift: int = 10
    screen_rows: int | None = 512
    confirm: int = 4
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise unknown_name("search settings", "metric", self.metric, METRICS)
        for name, valid, expected in (
            ("alpha and beta", 0 <= self.alpha < self.beta < math.inf, "0 <= alpha < beta"),
            ("n", self.n >= 1, "at least 1"),
            ("rounds", self.rounds >= 1, "at least 1"),
            ("max_shift", 0 <= self.max_shift <= 20, "0 to 20"),
            ("screen_rows", self.screen_rows is None or self.screen_rows >= 16, "None or at least 16"),
            ("confirm", self.confirm >= 1, "at least 1"),
            ("rounding", self.rounding in get_args(Rounding), " or ".join(get_args(Rounding))),
        ):
            if not valid:
                raise failure("SearchSettings", name, expected=expected, got=repr(self), do="change that value")

    @property
    def factors(self) -> list[float]:
        """The candidate multiples of the initial scale, ascending, without zero."""
        step = (self.beta - self.alpha) / self.n
        return [self.alpha + step * i for i in range(1, self.n + 1)]


#: The fields of `Transforms` that are exponents.
EXPONENTS = ("norms", "attention", "gates", "convolutions", "depthwise")


def _is_between(value: object, most: int) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= most


@dataclass(frozen=True)
class Transforms:
    """What is changed in front of the search so that less is lost: the float function stays what it is.

    rotation: the seed of an orthogonal matrix that the residual stream is rotated with; None leaves it.
    norms: the exponent by which channels behind a normalization are balanced: 0 not at all, 1 to equal ranges.
    attention: the same of q, k and v, whose channels are also shifted. gates: the same of the linear factor of gated
    units (SwiGLU). convolutions: the same of what a convolution reads or writes, where nothing but ReLU, pools and sums
    lies between the layers. depthwise: the same of what any other depthwise convolution reads, at the cost of one
    multiplication of each value in front of it.
    """

    rotation: int | None = None
    norms: float = 0.0
    attention: float = 0.0
    gates: float = 0.0
    convolutions: float = 0.0
    depthwise: float = 0.0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            (
                "rotation",
                self.rotation is None or _is_between(self.rotation, 2**63 - 1),
                "None or a seed, 0 to 2^63 - 1",
            ),
            *((name, _is_between(getattr(self, name), 1), "0 to 1") for name in EXPONENTS),
        ):
            if not valid:
                raise failure("Transforms", name, expected=expected, got=repr(self), do="change that value")
