"""How good a quantized model is: its outputs beside the float model's on the same images, arrays in and numbers out.

What its outputs are decides what is compared. Classes, logits (images, classes): how often the largest is the same one,
and how far the probabilities are apart. Embeddings (images, values): how close each is to its float one, and whether it
finds the same neighbours. Anything else, values: how close.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ptq4vit_fx.errors import printable
from ptq4vit_fx.views.tabular import Tabular

Kind = Literal["classes", "embeddings", "values"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Below this score (`AgainstFloat.score`) a quantized model deserves a warning.
BOUND = 0.99
#: Two-sided 95 % of a normal distribution lie within so many standard deviations.
Z95 = 1.959963984540054
#: Neighbours of an embedding that are compared.
NEIGHBOURS = 5


@dataclass(frozen=True)
class Share:
    """How many of how many images; `interval` is Wilson's 95 % interval of the share.

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
        return f"{self.count} of {self.of} images: {self.value:.1%} (95%: {low:.1%} to {high:.1%})"


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


@dataclass(frozen=True, repr=False)
class AgainstFloat(Tabular):
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

    def brief(self) -> str:
        """Return the headline."""
        return self.headline()

    def records(self) -> list[dict[str, Any]]:
        """Return the figures of every output, JSON-ready, the one that decides first."""
        return [
            {"output": name} | asdict(found) for name, found in {self.output: self.closeness, **self.others}.items()
        ]

    def headline(self) -> str:
        """Return the score as part of a sentence, at most 68 characters."""
        if self.same_class is not None:
            return f"same class on {self.same_class}"
        told = "embedding" if self.kind == "embeddings" else "output"
        recall = "" if self.recall is None else f"recall@1 {self.recall.value:.1%}, "
        return f"{recall}mean cosine of the {told} {self.closeness.cosine:.4f} on {self.images} images"

    def lines(self, most: int | None = None) -> tuple[str, ...]:
        """Return the figures, a sentence each; most: of the further outputs, those that are farthest off."""
        seen = {None: "", True: ", images that calibration has not seen", False: ", the images of the calibration"}
        lines = [self.headline() + seen[self.unseen]]
        if self.divergence is not None:
            lines.append(
                f"KL of the probabilities {self.divergence:.3g}, SNR of the logits {self.closeness.snr:.1f} dB"
            )
        else:
            lines.append(f"taken as {self.kind}, {self.decided}")
            lines.append(f"{self.closeness}, SNR {self.closeness.snr:.1f} dB")
        if self.recall is not None:
            lines.append(f"recall@1 {self.recall}")
            lines.append(f"nearest images: {self.neighbours:.1%} are the same")
        lines.append(str(self.worst))
        named = sorted(self.others, key=lambda name: -self.others[name].relative_error)[:most]
        lines += [f"output {name}: {self.others[name]}" for name in named]
        if len(named) < len(self.others):
            lines.append(f"{len(self.others) - len(named)} more outputs are closer")
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
