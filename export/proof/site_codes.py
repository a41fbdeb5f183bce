"""The integer codes of every site, in two programs that run one model: how many are equal, which differs first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptq4vit_fx.export.nodes import Array

#: Sites that are shown of those that differ.
WORST = 5


@dataclass(frozen=True)
class LayerComparison:
    """The integer codes of one site, or of one branch of a twin (`..._fine`, `..._coarse`).

    equal: share of codes that are the same. largest_difference: between two codes of a pair, in steps; None if the
    tensors have not even the same shape. images: how many were compared, 0 for a weight. same_scale: whether the file
    has the scale of the converted model.
    """

    site: str
    equal: float
    largest_difference: int | None
    images: int
    same_scale: bool

    @property
    def differs(self) -> bool:
        """Whether the file departs from the simulation here: in a code, or in what the codes stand for."""
        return self.equal < 1.0 or not self.same_scale


@dataclass(frozen=True)
class Layers:
    """Every site in the order of execution. missing: sites that the file has under no name, and so nothing compared.

    disturbed: whether the runtime gave other logits with the codes as outputs than without: it then ran another graph
    than the deployed one, and the codes are that one's.
    """

    sites: tuple[LayerComparison, ...] = ()
    missing: tuple[str, ...] = ()
    disturbed: bool = False

    @property
    def first_divergence(self) -> LayerComparison | None:
        """The first site, in the order of execution, that differs."""
        return next((site for site in self.sites if site.differs), None)

    def __str__(self) -> str:
        first = self.first_divergence
        images = max((site.images for site in self.sites), default=0)
        if first is None:
            lines = [f"layer by layer, {images} images: all codes of {len(self.sites)} sites are equal"]
        else:
            differing = [site for site in self.sites if site.differs]
            lines = [
                f"layer by layer, {images} images: {len(differing)} of {len(self.sites)} sites differ, first "
                f"{first.site}, {_describe(first)}"
            ]
            worst = sorted(differing, key=lambda site: site.equal)[:WORST]
            lines += [f"  {site.site:40} {_describe(site)}" for site in worst]
        if self.missing:
            lines.append(f"  not in the file, not compared: {', '.join(self.missing)}")
        if self.disturbed:
            lines.append("  with the codes as outputs the runtime computed other logits: it runs another graph then")
        return "\n".join(lines)


def _describe(site: LayerComparison) -> str:
    if site.largest_difference is None:
        return "its codes have another shape in the file"
    scale = "" if site.same_scale else "; the file has another scale"
    if site.equal == 1.0:
        return f"all codes equal{scale}"
    # Rounded, one code in a million would read as 100 %.
    share = np.floor(site.equal * 1e6) / 1e4
    return f"{share:.8g} % of the codes equal, the others off by up to {site.largest_difference}{scale}"


@dataclass(frozen=True)
class CodeCount:
    """Codes of one site so far: how many, how many equal, the largest difference (None: another shape)."""

    codes: int
    equal: int
    largest: int | None
    images: int
    same_scale: bool


def add_counts(before: CodeCount | None, now: CodeCount) -> CodeCount:
    if before is None:
        return now
    shaped = before.largest is not None and now.largest is not None
    return CodeCount(
        before.codes + now.codes,
        before.equal + now.equal,
        max(before.largest or 0, now.largest or 0) if shaped else None,
        before.images + now.images,
        before.same_scale and now.same_scale,
    )


def comparison_of(site: str, count: CodeCount) -> LayerComparison:
    return LayerComparison(site, count.equal / count.codes, count.largest, count.images, count.same_scale)


def count_codes(mine: Array, theirs: Array, images: int, same_scale: bool) -> CodeCount:
    """Return the count of a site whose integers (code minus zero point) are such in the two programs."""
    if mine.shape != theirs.shape:
        return CodeCount(mine.size, 0, None, images, same_scale)
    difference = np.abs(mine - theirs)
    return CodeCount(mine.size, int((difference == 0).sum()), int(difference.max(initial=0)), images, same_scale)
