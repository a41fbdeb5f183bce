"""A reader, the inputs that it is tried on, and the loop that tries them until its time is up."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from ptq4vit_fx import PTQError, PTQWarning

#: Inputs between two looks at the clock; each round has a seed of its own.
ROUND = 100


@dataclass(frozen=True)
class Target:
    """One reader. read: takes an input; it returns whatever it likes, or raises PTQError, and nothing else.

    reads: what that is, for the table. inputs: what is drawn; most of it near what is accepted.
    """

    name: str
    reads: str
    inputs: SearchStrategy[Any]
    read: Callable[[Any], object]


@dataclass(frozen=True)
class Figures:
    """What came of a target: inputs that were accepted and refused, the seconds in all and of the slowest input."""

    target: Target
    accepted: int
    refused: int
    seconds: float
    slowest: float


def fuzz(target: Target, seconds: float, first_seed: int = 0) -> Figures:
    """Try inputs until the time is up, at least one round; raises what `read` raised, with the smallest such input.

    Warnings other than PTQWarning are raised as well. The same seed tries the same inputs, as many as the time allows.
    """
    outcomes: list[tuple[bool, float]] = []

    def once(value: Any) -> None:
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", PTQWarning)
            accepted = _accepts(target, value)
        outcomes.append((accepted, time.perf_counter() - began))

    started, number = time.perf_counter(), first_seed
    limits = settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    while not outcomes or time.perf_counter() < started + seconds:
        seed(number)(limits(given(target.inputs)(once)))()
        number += 1
    took = time.perf_counter() - started
    accepted = sum(accepted for accepted, _ in outcomes)
    return Figures(target, accepted, len(outcomes) - accepted, took, max(slow for _, slow in outcomes))


def _accepts(target: Target, value: Any) -> bool:
    try:
        target.read(value)
    except PTQError:
        return False
    return True
