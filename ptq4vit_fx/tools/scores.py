"""How many labelled images are classified right, by a file and by the float model beside it: arrays in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4vit_fx.data.reading import said_of_skipped
from ptq4vit_fx.export.proof.against_float import Kind, Share
from ptq4vit_fx.tools.neighbours import alone, neighbours, unit

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
    kind: of embeddings an image is right if the nearest other one is of its class; alone: images without another one
    of their class, which do not count; cosine: of the file's embedding and float's, on average.
    """

    images: int
    skipped: tuple[str, ...]
    score: Score | None = None
    float_score: Score | None = None
    pair: Pair | None = None
    classes: tuple[ClassScore, ...] = ()
    kind: Kind = "classes"
    alone: int = 0
    cosine: float | None = None

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, *, per_class: bool = False) -> tuple[str, ...]:
        """Return the report; per_class: with the classes that lose, most first."""
        if self.kind == "embeddings":
            return self._of_embeddings(per_class=per_class)
        score = self.score
        top = f"top-1 {score.top1.value:.2%}" if score else "no readable image"
        lines = [said_of_skipped(self.skipped)] if self.skipped else []
        lines.append(f"{top} of {self.images} images, {len(self.skipped)} skipped")
        if score and score.top5:
            lines.append(f"top-5 {score.top5.value:.2%}")
        if self.float_score and self.pair:
            lines += [f"float {self.float_score}", str(self.pair), f"same class as float on {self.pair.same}"]
        return (*lines, *(self._losing() if per_class else ()))

    def _losing(self) -> list[str]:
        losing = [one for one in self.classes if one.right < one.float_right]
        return [f"{len(losing)} of {len(self.classes)} classes lose", *map(str, losing)]

    def _of_embeddings(self, *, per_class: bool) -> tuple[str, ...]:
        """Return the report of embeddings."""
        lines = [said_of_skipped(self.skipped)] if self.skipped else []
        top = f"recall@1 {self.score.top1.value:.2%}" if self.score else "no image with another one of its class"
        lines.append(f"{top} of {self.images} images, {len(self.skipped)} skipped: the nearest other is of its class")
        if self.score and self.score.top5:
            lines.append(f"recall@5 {self.score.top5.value:.2%}: one of the five nearest is")
        if self.alone:
            lines.append(f"images alone in their class, which do not count: {self.alone}")
        if self.float_score and self.pair:
            lines.append(f"float {str(self.float_score).replace('top-', 'recall@')}")
            lines += [str(self.pair), f"same nearest image as float on {self.pair.same}"]
            lines.append(f"mean cosine of the embedding to float's {self.cosine:.4f}")
        return (*lines, *(self._losing() if per_class else ()))

    def to_dict(self) -> dict[str, Any]:
        """Return every number, JSON-ready."""
        return asdict(self)


def classified(
    mine: Array, theirs: Array | None, labels: Array, names: Sequence[str], skipped: tuple[str, ...], classes: int
) -> Evaluation:
    """Return the evaluation of a file by the rank of the right class and the first class of each image, (images, 2).

    theirs: float's. names: of the classes, by number.
    """
    found = Evaluation(len(mine), skipped, score_of(mine[:, 0], classes))
    if theirs is None:
        return found
    same = int((mine[:, 1] == theirs[:, 1]).sum())
    return replace(
        found,
        float_score=score_of(theirs[:, 0], classes),
        pair=pair_of(mine[:, 0], theirs[:, 0], same),
        classes=classes_of(mine[:, 0], theirs[:, 0], labels, names),
    )


def retrieved(
    mine: Array, theirs: Array | None, labels: Array, names: Sequence[str], skipped: tuple[str, ...]
) -> Evaluation:
    """Return the evaluation of a file by its embeddings, (images, values); theirs: float's."""
    counted = ~alone(labels)
    left, images = int((~counted).sum()), int(counted.sum())
    found = Evaluation(images, skipped, kind="embeddings", alone=left)
    if not images:
        return found
    rank, nearest = (side[counted] for side in neighbours(mine, labels))
    found = replace(found, score=score_of(rank, len(labels) - 1))
    if theirs is None:
        return found
    float_rank, float_nearest = (side[counted] for side in neighbours(theirs, labels))
    return replace(
        found,
        float_score=score_of(float_rank, len(labels) - 1),
        pair=pair_of(rank, float_rank, int((nearest == float_nearest).sum())),
        classes=classes_of(rank, float_rank, labels[counted], names),
        cosine=float((unit(mine) * unit(theirs)).sum(1).mean()),
    )
