"""What a report says of a quantized model: values with numbers, in the order of the page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4vit_fx.errors import check_extra
from ptq4vit_fx.export.proof.against_float import AgainstFloat
from ptq4vit_fx.export.proof.inspection import FileReport
from ptq4vit_fx.export.proof.latency import Latency
from ptq4vit_fx.export.proof.operator_times import OperatorTimes
from ptq4vit_fx.export.report.facts import facts_of, missing_of
from ptq4vit_fx.export.report.seen import Seen
from ptq4vit_fx.files import write_file
from ptq4vit_fx.names import Operand, Site, block_and_role
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.views.tabular import Tabular


@dataclass(frozen=True)
class SiteEntry:
    """One operand. source: what it comes out of, "weight" of a weight. snr: in dB, as the search measured it.

    exact: whether the search found no difference at all, so that snr is None. note: what the file does with it.
    """

    site: Site
    operand: Operand
    source: str
    quantizer: str
    scale: str
    threshold: float | None
    snr: float | None
    exact: bool
    seen: Seen | None = None
    note: str = ""


@dataclass(frozen=True)
class ProductEntry:
    """One product and its operands, as the search measured them; None where that is not known.

    cost: its share of the distance of all products. share: its distance over that of an output of zeros. snr: of its
    output, in dB. runs: how the runtime multiplies it.
    """

    name: str
    kind: str
    order: int
    sites: tuple[SiteEntry, SiteEntry]
    before: float | None = None
    after: float | None = None
    cost: float | None = None
    share: float | None = None
    snr: float | None = None
    runs: str = ""

    @property
    def weakest(self) -> float | None:
        """The smaller ratio of both operands."""
        return min((site.snr for site in self.sites if site.snr is not None), default=None)


@dataclass(frozen=True)
class Known:
    """What whoever wrote a file has measured already, for its report; None or empty: nothing.

    why: why something was not measured. next: commands to go on with. command: the one that wrote the file.
    """

    against: AgainstFloat | None = None
    latency: Latency | None = None
    times: OperatorTimes | None = None
    float_times: OperatorTimes | None = None
    float_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    next: tuple[str, ...] = ()
    command: str = ""
    why: str = ""


@dataclass(frozen=True, repr=False)
class Report(Tabular):
    """Everything that the page of a file says, or of a calibration alone: inspected is None then.

    bytes: of the file, with the weights beside it; weight_bytes: of its weights, were they float. images_seen: those
    that histograms are of.
    """

    name: str
    plan: QuantPlan
    products: tuple[ProductEntry, ...]
    known: Known
    provenance: Mapping[str, Any]
    inspected: FileReport | None = None
    bytes: int = 0
    weight_bytes: int = 0
    images_seen: int = 0

    def costly(self) -> tuple[ProductEntry, ...]:
        """Return the products, those that cost most first: by their distance, else by their weakest operand."""

        def rank(product: ProductEntry) -> tuple[float, float, int]:
            weakest = product.weakest
            return -(product.cost or 0.0), float("inf") if weakest is None else weakest, product.order

        return tuple(sorted(self.products, key=rank))

    def over_depth(self) -> tuple[tuple[str, ...], dict[str, list[ProductEntry | None]]]:
        """Return the blocks in the order of execution, and role -> its product in each, of roles of several blocks."""
        placed = [(*block_and_role(product.name), product) for product in self.products]
        blocks = tuple(dict.fromkeys(block for block, _, _ in placed if block))
        roles: dict[str, list[ProductEntry | None]] = {}
        for block, role, product in placed:
            if block:
                roles.setdefault(role, [None] * len(blocks))[blocks.index(block)] = product
        return blocks, {role: found for role, found in roles.items() if sum(map(bool, found)) > 1}

    def brief(self) -> str:
        """Return what it is of, and how good that is, as far as it is known."""
        good = "not compared with float" if self.known.against is None else self.known.against.headline()
        return f"{self.name}, {len(self.products)} products, {good}"

    def records(self) -> list[dict[str, Any]]:
        """Return a dictionary per site, JSON-ready, those of the most expensive products first."""
        return [
            {
                "site": site.site,
                "quantizer": site.quantizer,
                "scale": site.scale,
                "snr": site.snr,
                "cost": product.cost,
                "distance": product.after,
                "share": product.share,
                "clipped": None if site.seen is None else site.seen.clipped,
                "snr_seen": None if site.seen is None else site.seen.snr,
            }
            for product in self.costly()
            for site in product.sites
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of the page, JSON-ready; of histograms their figures alone."""
        measured = {
            name: None if found is None else found.to_dict()
            for name, found in (
                ("against", self.known.against),
                ("latency", self.known.latency),
                ("times", self.known.times),
                ("float_times", self.known.float_times),
            )
        }
        facts = {"name": self.name, "summary": dict(facts_of(self)), "missing": missing_of(self)}
        return facts | measured | {"warnings": self.known.warnings, "sites": self.records()}

    def lines(self, path: str) -> tuple[str, ...]:
        """Return what there is to say of the page that was written there: what it lacks, and what would bring it."""
        return path, *missing_of(self).values()

    def page(self) -> str:
        """Return the report as one HTML page that needs nothing else.

        Raises PTQError without matplotlib, which the extra `report` brings.
        """
        check_extra("report", "the page", "report", "matplotlib")
        from ptq4vit_fx.export.report.page import page_of  # draws

        return page_of(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page; raises PTQError if it cannot be written."""
        write_file(path, self.page().encode(), "save report")
        return Path(path)
