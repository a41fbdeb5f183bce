"""What to do about a file that is worse than float: the products that cost most, and the options that help."""

from __future__ import annotations

from typing import Protocol

from ptq4vit_fx.calibration import Calibration

#: Products that a warning names.
NAMED = 3
#: So many calibration images are worth a try; more have changed little (docs/calibration.md).
IMAGES = 128


class Asked(Protocol):
    """The options of `ptq4vit quantize` that decide how good a file is."""

    @property
    def recipe(self) -> str: ...
    @property
    def twins(self) -> str: ...
    @property
    def w_bits(self) -> int: ...
    @property
    def a_bits(self) -> int: ...
    @property
    def images(self) -> int: ...


def most_expensive(calibration: Calibration, most: int = NAMED) -> dict[str, float]:
    """Return product -> its share of the distance of all products, of the few with the largest.

    The distance is that of the search, weighted by squared gradients of the loss where it has them, which compares
    products with each other.
    """
    after = {name: distance for name, (_, distance) in calibration.distances.items() if distance > 0}
    total = sum(after.values())
    largest = sorted(after, key=lambda name: -after[name])[:most]
    return {name: after[name] / total for name in largest}


def helpful_flags(asked: Asked, others: int) -> tuple[str, ...]:
    """Return the options that would make a file better, those that do most first.

    others: images of the folder that calibration did not take.
    """
    flags = []
    narrow = [f"--{name}-bits 8" for name, bits in (("w", asked.w_bits), ("a", asked.a_bits)) if bits < 8]
    if narrow:
        flags.append(" ".join(narrow))
    if asked.recipe in ("base", "ptq4vit"):
        flags.append("--recipe best")
    if asked.recipe in ("best", "ptq4vit"):
        if asked.twins in ("uniform", "auto"):
            flags.append("--twins exact")
        elif asked.twins == "exact" and asked.a_bits < 8:
            flags.append("--twins wide")
    if asked.images < IMAGES and others:
        flags.append(f"--images {min(IMAGES, asked.images + others)}")
    return tuple(flags)
