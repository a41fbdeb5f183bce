"""How good a quantized model is: its outputs beside the float model's on the same images, arrays in and numbers out.

What its outputs are decides what is compared. Classes, logits (images, classes): how often the largest is the same one,
and how far the probabilities are apart. Embeddings (images, values): how close each is to its float one, and whether it
finds the same neighbours. Anything else, values: how close.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ptq4vit_fx.errors import failure, printable, unknown_name
from ptq4vit_fx.passes.graph.outputs import logits_in

Array = NDArray[Any]
Kind = Literal["classes", "embeddings", "values"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Below this score (`AgainstFloat.score`) a quantized model deserves a warning.
BOUND = 0.99
#: Two-sided 95 % of a normal distribution lie within so many standard deviations.
Z95 = 1.959963984540054
#: Neighbours of an embedding that are compared.
NEIGHBOURS = 5
#: Rows of similarities at a time.
ROWS = 1024
#: What models call the embedding that they return beside other outputs.
EMBEDDINGS = frozenset(["pooler_output", "image_embeds", "embedding", "embeddings", "features", "x_norm_clstoken"])


@dataclass(frozen=True)
class Share:
    """How many of how many images; `low` and `high` are Wilson's 95 % interval of the share.

    Wilson, J. Am. Stat. Assoc. 22 (1927), 209: it holds for few images and close to 0 and 1 too.
    """

    count: int
    of: int

    @property
    def value(self) -> float:
        return self.count / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.of:
            return 0.0, 1.0
        share, n = self.count / self.of, self.of
        middle, scale = share + Z95**2 / (2 * n), 1 + Z95**2 / n
        half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
        low = 0.0 if not self.count else (middle - half) / scale
        return low, 1.0 if self.count == self.of else (middle + half) / scale

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count} of {self.of} images: {self.value:.1%} (95 %: {100 * low:.1f} to {100 * high:.1f} %)"


@dataclass(frozen=True)
class Worst:
    """The image on which int8 is farthest from float: its number, its name if images have names, and how far.

    divergence: KL in nats, of classes; cosine: between both outputs. classes: float's and int8's, of classes alone.
    """

    image: int
    name: str
    cosine: float
    divergence: float | None = None
    classes: tuple[int, int] | None = None

    def __str__(self) -> str:
        told = f"cosine {self.cosine:.4f}"
        if self.classes is not None:
            other = self.classes[0] != self.classes[1]
            told = f"class {self.classes[1]}" + (f" instead of {self.classes[0]}" if other else ", as float")
            told += f", KL {self.divergence:.3g}"
        return f"worst image {self.image}{f' ({self.name})' * bool(self.name)}: {told}"


@dataclass(frozen=True)
class Closeness:
    """How close an output is to float's: cosine per image, on average and at least; relative error; SNR in dB.

    relative_error: norm of the difference over that of float's output, all images together; snr: 20 times its negative
    decimal logarithm, infinite where nothing differs.
    """

    cosine: float
    smallest_cosine: float
    relative_error: float
    snr: float

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.4f}, at least {self.smallest_cosine:.4f}, relative error {self.relative_error:.1%}"
        )


@dataclass(frozen=True)
class AgainstFloat:
    """A quantized model against the float model, on `images` images.

    kind: what the output called `output` is; `decided` says by what. same_class: images with the same largest logit.
    divergence: mean KL(float || int8) of the probabilities, in nats. recall: embeddings whose nearest float embedding
    is that of the same image (recall@1, the images are the gallery). neighbours: the share of each one's nearest other
    images (`NEIGHBOURS`, or as many as there are) that are the same from int8 and from float. others: the closeness of
    every further output. unseen: whether calibration has not seen these images; None if that is not known.
    """

    kind: Kind
    output: str
    decided: str
    images: int
    closeness: Closeness
    worst: Worst
    same_class: Share | None = None
    divergence: float | None = None
    recall: Share | None = None
    neighbours: float | None = None
    others: Mapping[str, Closeness] = field(default_factory=dict)
    unseen: bool | None = None

    @property
    def score(self) -> float:
        """From 0 to 1: the share of the same classes; else the mean cosine, of embeddings recall@1 if that is less."""
        if self.same_class is not None:
            return self.same_class.value
        recall = 1.0 if self.recall is None else self.recall.value
        return min(max(self.closeness.cosine, 0.0), recall)

    def ok(self, bound: float = BOUND) -> bool:
        """Return whether the score reaches a bound."""
        return self.score >= bound

    def headline(self) -> str:
        """Return the score as part of a sentence, at most 68 characters."""
        if self.same_class is not None:
            return f"same class on {self.same_class}"
        told = "embedding" if self.kind == "embeddings" else "output"
        return f"cosine of the {told} {self.closeness.cosine:.4f} on average over {self.images} images"

    def lines(self) -> tuple[str, ...]:
        """Return the figures, a sentence each."""
        seen = {None: "", True: ", images that calibration has not seen", False: ", the images of the calibration"}
        lines = [self.headline() + seen[self.unseen]]
        if self.divergence is not None:
            lines.append(
                f"KL of the probabilities {self.divergence:.3g}, SNR of the logits {self.closeness.snr:.1f} dB"
            )
        else:
            lines.append(f"{self.closeness}, SNR {self.closeness.snr:.1f} dB")
        if self.recall is not None:
            lines.append(f"recall@1 {self.recall}")
            lines.append(f"nearest images: {self.neighbours:.1%} are the same")
        lines += [str(self.worst), *(f"output {name}: {found}" for name, found in self.others.items())]
        return tuple(map(printable, lines))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """Return every number, JSON-ready, with the shares' intervals, the score and what it is compared with."""
        figures = asdict(self)
        for name in ("same_class", "recall"):
            share: Share | None = getattr(self, name)
            if share is not None:
                figures[name] |= {"value": share.value, "interval": share.interval}
        return figures | {"score": self.score, "bound": BOUND, "ok": self.ok()}


@np.errstate(all="ignore")
def against_float(
    reference: Mapping[str, Array],
    actual: Mapping[str, Array],
    *,
    kind: Kind | None = None,
    says: str | None = None,
    names: Sequence[str] = (),
    unseen: bool | None = None,
) -> AgainstFloat:
    """Compare the outputs of a quantized model (`actual`) with float's: name -> array (images, ...), the same names.

    kind: what the output is that counts, or None: `decide`. says: what the model says that it is, "classes" or
    "embeddings", where it says so. names: of the images, in their order. Raises PTQError on arrays without images, on
    other sizes than float's, on an unknown kind and on one that the output cannot be.
    """
    for name, array in actual.items():
        other = reference[name].shape
        if (len(array), array.size) != (len(reference[name]), reference[name].size) or not array.size:
            do = "compare a file with the model that it was made from"
            got = str(array.shape)
            raise failure("compare_float", f"output {name}", expected=f"float's shape {other}", got=got, do=do)
    output, found, decided = decide(actual, kind, says)
    mine, theirs = (np.asarray(side[output], np.float64).reshape(len(side[output]), -1) for side in (reference, actual))
    cosines = _cosines(*_comparable(mine, theirs))
    figures: dict[str, Any] = {}
    place, divergence, classes = int(cosines.argmin()), None, None
    if found == "classes":
        divergences, top, other_top = _divergences(mine, theirs), mine.argmax(1), theirs.argmax(1)
        same = (top == other_top) & np.isfinite(theirs.max(1))
        figures = {"same_class": Share(int(same.sum()), len(same)), "divergence": float(divergences.mean())}
        place = _farthest(divergences, same)
        divergence, classes = float(divergences[place]), (int(top[place]), int(other_top[place]))
    elif found == "embeddings" and len(mine) > 1:
        figures = dict(zip(("recall", "neighbours"), _retrieval(mine, theirs), strict=True))
    return AgainstFloat(
        kind=found,
        output=output,
        decided=decided,
        images=len(mine),
        closeness=closeness(mine, theirs),
        worst=Worst(place, names[place] if place < len(names) else "", float(cosines[place]), divergence, classes),
        others={n: closeness(reference[n], x) for n, x in actual.items() if n != output and x.dtype.kind in "fiub"},
        unseen=unseen,
        **figures,
    )


def decide(outputs: Mapping[str, Array], kind: Kind | None, says: str | None) -> tuple[str, Kind, str]:
    """Return the output that counts, what it is, and what decided that.

    The user (`kind`) decides, then the model (`says`), then names and shapes: an output (images, values) of at least
    two values is classes, unless its name is one of EMBEDDINGS; any other shape is values.
    """
    if kind is not None and kind not in KINDS:
        raise unknown_name("compare_float", "kind", kind, KINDS)
    floats = {name: x for name, x in outputs.items() if x.dtype.kind == "f"} or dict(outputs)
    named = [name for name in floats if name.rpartition(".")[2] in EMBEDDINGS]
    name = logits_in(floats) or next(iter(named or floats))
    is_table = floats[name].ndim == 2 and floats[name].shape[1] > 1
    if kind in ("classes", "embeddings") and not is_table:
        expected, do = f"(images, values) as {kind} have it", 'pass kind="values"'
        got = str(floats[name].shape)
        raise failure("compare_float", f"output {name}", expected=expected, got=got, do=do)
    if kind is not None:
        return name, kind, "as asked for"
    if not is_table:
        return name, "values", f"of shape {floats[name].shape}"
    if says in ("classes", "embeddings"):
        return name, "classes" if says == "classes" else "embeddings", "as the model says"
    if name in named:
        return name, "embeddings", f"by the name {name}"
    return name, "classes", f"by the shape (images, {floats[name].shape[1]})"


@np.errstate(all="ignore")
def closeness(reference: Array, actual: Array) -> Closeness:
    """Return how close an output is to float's; both (images, ...)."""
    mine, theirs = _comparable(*(np.asarray(x, np.float64).reshape(len(x), -1) for x in (reference, actual)))
    cosines = _cosines(mine, theirs)
    noise, signal = float(np.linalg.norm(theirs - mine)), float(np.linalg.norm(mine))
    error = 0.0 if noise == 0 else math.inf if signal == 0 or math.isnan(noise) else noise / signal
    snr = math.inf if error == 0 else -20 * math.log10(error) if error < math.inf else -math.inf
    return Closeness(float(cosines.mean()), float(cosines.min()), error, snr)


def _comparable(mine: Array, theirs: Array) -> tuple[Array, Array]:
    """Return both with 0 where they have the same infinity or NaN: a mask is no difference."""
    same = ~np.isfinite(mine) & ((mine == theirs) | (np.isnan(mine) & np.isnan(theirs)))
    return np.where(same, 0.0, mine), np.where(same, 0.0, theirs)


def _cosines(mine: Array, theirs: Array) -> Array:
    """Return the cosine per row: 1 of two that are equal, 0 where either is zero or not finite."""
    products = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = np.clip((mine * theirs).sum(1) / products, -1.0, 1.0)
    return np.where((mine == theirs).all(1), 1.0, np.where(np.isfinite(cosines), cosines, 0.0))


def _divergences(mine: Array, theirs: Array) -> Array:
    """Return KL(softmax(mine) || softmax(theirs)) per row, in nats; infinite where theirs is no distribution."""
    logs = [x - x.max(1, keepdims=True) for x in (mine, theirs)]
    logs = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in logs]
    weight = np.exp(logs[0])
    divergences = np.where(weight > 0, weight * (logs[0] - logs[1]), 0.0).sum(1)
    return np.where(np.isnan(divergences), np.inf, np.maximum(divergences, 0.0))


def _farthest(divergences: Array, same: Array) -> int:
    """Return the image of the largest divergence, among those with another class if there are any.

    A wrong answer is worse than one that is less certain.
    """
    counted = divergences if same.all() else np.where(same, -1.0, divergences)
    return int(counted.argmax())


def _retrieval(mine: Array, theirs: Array) -> tuple[Share, float]:
    """Return recall@1 of int8 embeddings among float's, and the share of nearest other images that are the same."""
    mine, theirs = (np.nan_to_num(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (mine, theirs))
    nearest, hits, common = min(NEIGHBOURS, len(mine) - 1), 0, 0
    for start in range(0, len(mine), ROWS):
        rows = np.arange(start, min(start + ROWS, len(mine)))
        from_float, from_int8 = mine[rows] @ mine.T, theirs[rows] @ mine.T
        own = from_int8[rows - start, rows]
        # Equal images have equal embeddings: one of them is found as well as the other.
        hits += int((own >= from_int8.max(1) - 1e-12).sum())
        for similar in (from_float, from_int8):
            similar[rows - start, rows] = -np.inf
        found = (np.argpartition(-similar, nearest - 1, axis=1)[:, :nearest] for similar in (from_float, from_int8))
        common += sum(len(set(a) & set(b)) for a, b in zip(*found, strict=True))
    return Share(hits, len(mine)), common / (nearest * len(mine))
