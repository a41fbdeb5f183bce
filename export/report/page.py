"""A report as one HTML page: jinja2 writes it, everything that comes out of files is escaped, nothing is fetched."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jinja2
from markupsafe import Markup

from ptq4vit_fx.errors import printable
from ptq4vit_fx.export.report import pictures
from ptq4vit_fx.export.report.content import ProductEntry, Report, SiteEntry
from ptq4vit_fx.export.report.facts import ORDERS, facts_of, missing_of, repeat_of

OPERANDS = {"lhs": "left operand", "rhs": "right operand", "out": "output"}


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ptq4vit_fx.export.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: (
            value if isinstance(value, Markup) or not isinstance(value, str) else printable(value, "\n")
        ),
    )
    environment.filters |= {"number": number, "percent": percent, "decibel": decibel}
    return environment


def page_of(report: Report) -> str:
    """Return the page of a report."""
    products = report.costly()
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            known=report.known,
            facts=facts_of(report),
            missing=missing_of(report),
            repeat=repeat_of(report),
            products=products,
            orders={word: _ranks(report, word) for word in ORDERS},
            pictures={site.site: _picture(site, n) for n, site in enumerate(s for p in products for s in p.sites)},
            curves=_curves(report),
            times=_times(report),
            provenance=json.dumps(dict(report.provenance), indent=1, ensure_ascii=False, default=str),
            most_cost=max((product.cost or 0.0 for product in products), default=0.0),
        )
    )


def _ranks(report: Report, word: str) -> dict[str, int]:
    """Return product -> its place in an order."""
    values = {product.name: ORDERS[word](product) for product in report.products}
    known = {name: value for name, value in values.items() if value is not None and not math.isnan(value)}
    ranked = [*sorted(known, key=lambda name: -known[name]), *(name for name in values if name not in known)]
    return {name: place for place, name in enumerate(ranked)}


def _picture(site: SiteEntry, count: int) -> Markup | None:
    return None if site.seen is None else pictures.histogram(site.seen, f"site{count}")


def _curves(report: Report) -> dict[str, Any] | None:
    """Return the pictures of both operands and the output over depth, and a colour per role; None without blocks."""
    blocks, roles = report.over_depth()
    read: dict[str, Callable[[ProductEntry], float | None]] = {
        "lhs": lambda product: product.sites[0].snr,
        "rhs": lambda product: product.sites[1].snr,
        "out": lambda product: product.snr,
    }
    lines = {part: [[own(p) if p else None for p in line] for line in roles.values()] for part, own in read.items()}
    if not any(value is not None for line in lines["out"] for value in line):
        return None
    drawn = {OPERANDS[part]: pictures.curves(found, f"curve-{part}") for part, found in lines.items()}
    return {"pictures": drawn, "roles": {role: pictures.colour_of(n) for n, role in enumerate(roles)}, "blocks": blocks}


def _times(report: Report) -> list[tuple[str, float | None, float | None]]:
    """Return operator, milliseconds of the file and of float, those that take most first."""
    mine = report.known.times.milliseconds if report.known.times else {}
    theirs = report.known.float_times.milliseconds if report.known.float_times else {}
    names = sorted(mine.keys() | theirs.keys(), key=lambda name: -max(mine.get(name, 0.0), theirs.get(name, 0.0)))
    return [(name, mine.get(name), theirs.get(name)) for name in names]


def number(value: float | None) -> str:
    """Return a number in few digits, a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Return a share in percent; one that is too small to be seen is said to be so, not nothing."""
    if value is None or math.isnan(value):
        return "–"
    return "< 0.1 %" if 0 < value < 0.001 else f"{100 * value:.1f} %"


def decibel(value: float | None) -> str:
    """Return a ratio in dB."""
    return "–" if value is None or math.isnan(value) else "exact" if math.isinf(value) else f"{value:.1f} dB"
