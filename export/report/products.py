"""The products of a report: from what a file says of itself, or from a calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.export.metadata import Figures
from ptq4vit_fx.export.proof.inspection import FileReport, SiteRecord
from ptq4vit_fx.export.report.content import ProductEntry, SiteEntry
from ptq4vit_fx.export.report.seen import Seen
from ptq4vit_fx.names import OPERANDS, Operand, Site, path_of, site
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.quantizers import describe_quantizer

#: Site -> its scales in text, its threshold, what the file does with it.
Stored = Callable[[Site], tuple[str, float | None, str]]


def figures_of_calibration(calibration: Calibration) -> Figures:
    """Return what a calibration has measured, as a file has it."""
    snr = {name: ratio if math.isfinite(ratio) else None for name, ratio in calibration.snr.items()}
    return Figures(dict(calibration.distances), dict(calibration.shares), snr)


def products_of(
    plan: QuantPlan, stored: Stored, figures: Figures, seen: Mapping[Site, Seen], inspected: FileReport | None
) -> tuple[ProductEntry, ...]:
    """Return every product of a plan, in its order."""
    total = sum(after for _, after in figures.distances.values())
    runs = _runs(inspected)
    found = []
    for order, op in enumerate(plan.ops):
        before, after = figures.distances.get(op.name, (None, None))
        cost = after / total if after is not None and total > 0 else None
        lhs, rhs = (_site(op, operand, plan, stored, figures, seen) for operand in OPERANDS)
        share, snr, how = figures.shares.get(op.name), figures.snr.get(op.name), runs.get(op.name, "")
        found.append(ProductEntry(op.name, op.kind, order, (lhs, rhs), before, after, cost, share, snr, how))
    return tuple(found)


def _site(
    op: QuantOp, operand: Operand, plan: QuantPlan, stored: Stored, figures: Figures, seen: Mapping[Site, Seen]
) -> SiteEntry:
    key = site(op.name, operand)
    scale, threshold, note = stored(key)
    source = "weight" if operand == "rhs" and op.rhs_is_weight else op.source(operand) or ""
    exact = key in figures.snr and figures.snr[key] is None
    quantizer = describe_quantizer(plan.quantizers[key])
    return SiteEntry(
        key, operand, source, quantizer, scale, threshold, figures.snr.get(key), exact, seen.get(key), note
    )


def _runs(inspected: FileReport | None) -> dict[str, str]:
    """Return product -> how the runtime multiplies it: as integers if all its parts are."""
    found: dict[str, str] = {}
    for product in () if inspected is None else inspected.graph.products:
        name = path_of(product.name)
        how = "integers" if product.integer else f"float: {product.reason}"
        found[name] = how if found.get(name, "integers") == "integers" else found[name]
    return found


def stored_in_file(inspected: FileReport) -> Stored:
    """Return what a file has of a site."""
    records: dict[Site, SiteRecord] = {record.site: record for record in inspected.sites}

    def stored(key: Site) -> tuple[str, float | None, str]:
        record = records.get(key)
        if record is None:  # a float operand beside a weight that is quantized alone
            return "", None, ""
        note = "" if record.merged_with is None else f"one quantizer with {record.merged_with}"
        return record.scale_text, record.threshold, note

    return stored


def stored_in_calibration(calibration: Calibration) -> Stored:
    """Return what a calibration has of a site, which may be nothing yet."""

    def stored(key: Site) -> tuple[str, float | None, str]:
        if key not in calibration.params:
            return "", None, "not calibrated yet"
        params = calibration.params[key]
        threshold = calibration.plan.quantizers[key].threshold(params)
        return params.describe(), None if threshold is None else float(threshold), ""

    return stored
