"""Outputs of a file beside those of the simulation, image by image: what differs, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ptq4vit_fx.export.proof.outputs import Array
from ptq4vit_fx.passes.graph.outputs import logits_in


@dataclass(frozen=True)
class Disagreement:
    """An image on which the top-1 classes differ.

    simulated, actual: the class that each chose. margin: how far the simulation's class leads over the runtime's, in
    the simulation's logits. difference: the largest logit difference on that image.
    """

    image: int
    simulated: int
    actual: int
    margin: float
    difference: float


@dataclass(frozen=True)
class Comparison:
    """Logits of ONNX Runtime against logits of the simulation, over all images.

    max_absolute_difference: in logits. median_difference: of the largest one per image. max_relative_difference: the
    largest one over the largest logit of the same image. agreement: share of images with the same top-1.
    bit_equal: share of images whose logits are all equal, bit for bit.
    cosine: the smallest over the images.
    """

    images: int
    max_absolute_difference: float
    median_difference: float
    max_relative_difference: float
    agreement: float
    bit_equal: float
    cosine: float
    disagreements: tuple[Disagreement, ...]

    def __str__(self) -> str:
        return (
            f"top-1 agreement {self.agreement:.2%}, bit-equal {self.bit_equal:.2%}, largest logit difference "
            f"{self.max_absolute_difference:.3g} ({self.max_relative_difference:.2%} of the largest logit), smallest "
            f"cosine {self.cosine:.6f}"
        )


@np.errstate(invalid="ignore", over="ignore")  # infinity, or numbers close to it
def compare(simulated: Array, actual: Array) -> Comparison:
    """Compare two sets of logits, (images, classes) float32 each; or of other outputs (images, ...) of any type."""
    tiny = np.finfo(np.float32).tiny
    simulated, actual = _comparable(simulated, actual)
    difference, scale = np.abs(actual - simulated).max(1, initial=0), np.abs(simulated).max(1, initial=0)
    wide = [x.astype(np.float64) for x in (simulated, actual)]  # the square of a logit of 1e20 is no float32
    norms = np.linalg.norm(wide[0], axis=1) * np.linalg.norm(wide[1], axis=1)
    cosine = (wide[0] * wide[1]).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)
    top, mine = (x.argmax(1) if x.shape[1] else np.zeros(len(x), np.int64) for x in (actual, simulated))
    rows = np.arange(len(top))
    margin = simulated[rows, mine] - simulated[rows, top] if simulated.shape[1] else difference
    return Comparison(
        images=len(top),
        max_absolute_difference=float(difference.max()),
        median_difference=float(np.median(difference)),
        max_relative_difference=float((difference / np.maximum(scale, tiny)).max()),
        agreement=float((top == mine).mean()),
        bit_equal=float((difference == 0).mean()),
        cosine=float(np.where((norms == 0) & (difference == 0), 1.0, cosine).min()),
        disagreements=tuple(
            Disagreement(int(i), int(mine[i]), int(top[i]), float(margin[i]), float(difference[i]))
            for i in np.flatnonzero(top != mine)
        ),
    )


def _comparable(simulated: Array, actual: Array) -> tuple[Array, Array]:
    """Return both as floats (images, values), 0 where both have the same infinity or NaN: a mask is no difference."""
    floats = np.float32 if actual.dtype.kind in "fb" else np.float64
    mine, theirs = (x.reshape(len(x), -1).astype(floats) for x in (simulated, actual))
    same = ~np.isfinite(mine) & ((mine == theirs) | (np.isnan(mine) & np.isnan(theirs)))
    return np.where(same, floats(0), mine), np.where(same, floats(0), theirs)


def compare_outputs(simulated: Mapping[str, Array], actual: Mapping[str, Array]) -> Comparison:
    """Compare every output of a file with the simulation's: the worst of all, and the classes of the logits.

    Of integers (classes, masks) only the equality counts. Without logits among several outputs, the position of the
    largest value of all outputs is what agrees or not.
    """
    names = [name for name in actual if actual[name].dtype.kind == "f"] or list(actual)
    each = {name: compare(simulated[name], actual[name]) for name in names}
    found = logits_in({name: actual[name] for name in names})
    decisive = each.get(found or "") or compare(
        *(np.concatenate([side[n].reshape(len(side[n]), -1) for n in names], axis=1) for side in (simulated, actual))
    )
    equal = [(mine == theirs).all(1) for mine, theirs in (_comparable(simulated[n], actual[n]) for n in actual)]
    return replace(
        decisive,
        max_absolute_difference=max(found.max_absolute_difference for found in each.values()),
        median_difference=max(found.median_difference for found in each.values()),
        max_relative_difference=max(found.max_relative_difference for found in each.values()),
        bit_equal=float(np.all(equal, axis=0).mean()),
        cosine=min(found.cosine for found in each.values()),
    )
