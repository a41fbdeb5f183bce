"""How many labelled images are classified right, by a file and by the float model beside it: arrays in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4vit_fx.data.reading import said_of_skipped
from ptq4vit_fx.export.proof.against_float import Share

Array = NDArray[Any]
#: The right class counts if it is among so many.
TOP = 5


@dataclass(frozen=True)
class Score:
    """Images whose right class is the first, and among the first TOP; None of a model that has no more classes."""

    top1: Share
    top5: Share | None

    def __str__(self) -> str:
        return f"top-1 {self.top1.value:.2%}" + (f", top-5 {self.top5.value:.2%}" if self.top5 else "")


@dataclass(frozen=True)
class Pair:
    """A file beside float on the same images: top-1 of the file less that of float, and its standard error.

    Both see the same images, so what counts are those that one of them alone gets right: gained by the file, lost by
    it. The error is the standard deviation of the differences per image over the root of their number. same: images
    with the same first class, right or not.
    """

    difference: float
    error: float
    gained: int
    lost: int
    same: Share

    def __str__(self) -> str:
        return (
            f"difference {100 * self.difference:+.2f} points, standard error {100 * self.error:.2f}: "
            f"{self.lost} images right in float alone, {self.gained} in the file alone"
        )


@dataclass(frozen=True)
class ClassScore:
    """The images of one class that are right, by the file and by float."""

    name: str
    images: int
    right: int
    float_right: int

    def __str__(self) -> str:
        change = (self.right - self.float_right) / self.images
        return f"{self.name}: {100 * change:+.1f} points, {self.right} of {self.images} right, float {self.float_right}"


def ranks(logits: Array, labels: Array) -> Array:
    """Return how many classes are in front of the right one, per image; of equal ones the first is in front.

    logits: (images, classes). Where one is NaN all classes are.
    """
    own = np.take_along_axis(logits, labels[:, None], 1)
    first = np.arange(logits.shape[1]) < labels[:, None]
    found = ((logits > own) | ((logits == own) & first)).sum(1)
    ranked: Array = np.where(np.isnan(logits).any(1), logits.shape[1], found)
    return ranked


def score_of(rank: Array, classes: int) -> Score:
    """Return the score of images by the ranks of their right classes."""
    shares = [Share(int((rank < most).sum()), len(rank)) for most in (1, TOP)]
    return Score(shares[0], shares[1] if classes > TOP else None)


def pair_of(rank: Array, float_rank: Array, same: int) -> Pair:
    """Return a file beside float by the ranks of the right classes; same: images with the same first class."""
    right, float_right = rank == 0, float_rank == 0
    difference = right.astype(np.float64) - float_right
    error = float(difference.std(ddof=1)) / math.sqrt(len(rank)) if len(rank) > 1 else math.nan
    gained, lost = int((right & ~float_right).sum()), int((float_right & ~right).sum())
    return Pair(float(difference.mean()), error, gained, lost, Share(same, len(rank)))


def classes_of(rank: Array, float_rank: Array, labels: Array, names: Sequence[str]) -> tuple[ClassScore, ...]:
    """Return every class that has images, those that lose most first; names: of the classes, by number."""
    found = []
    for label in np.unique(labels):
        own = labels == label
        right, float_right = (int((side[own] == 0).sum()) for side in (rank, float_rank))
        name = names[label] if label < len(names) else str(label)
        found.append(ClassScore(name, int(own.sum()), right, float_right))
    return tuple(sorted(found, key=lambda one: (one.right - one.float_right) / one.images))


@dataclass(frozen=True)
class Evaluation:
    """How many images were classified right; `skipped` lists unreadable files with the reason.

    float_score, pair, classes: of the float model beside it, if there is one; score: None without a readable image.
    """

    images: int
    skipped: tuple[str, ...]
    score: Score | None = None
    float_score: Score | None = None
    pair: Pair | None = None
    classes: tuple[ClassScore, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, *, per_class: bool = False) -> tuple[str, ...]:
        """Return the report; per_class: with the classes that lose, most first."""
        score = self.score
        top = f"top-1 {score.top1.value:.2%}" if score else "no readable image"
        lines = [said_of_skipped(self.skipped)] if self.skipped else []
        lines.append(f"{top} of {self.images} images, {len(self.skipped)} skipped")
        if score and score.top5:
            lines.append(f"top-5 {score.top5.value:.2%}")
        if self.float_score and self.pair:
            lines += [f"float {self.float_score}", str(self.pair), f"same class as float on {self.pair.same}"]
        if per_class:
            losing = [one for one in self.classes if one.right < one.float_right]
            lines += [f"{len(losing)} of {len(self.classes)} classes lose", *map(str, losing)]
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return every number, JSON-ready."""
        return asdict(self)
