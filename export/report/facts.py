"""Sentences of a report: its summary, what is missing and which option brings it, how the file is made again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from ptq4vit_fx.names import site
from ptq4vit_fx.plan import QuantPlan

if TYPE_CHECKING:
    from ptq4vit_fx.export.report.content import ProductEntry, Report


def bits_of(plan: QuantPlan) -> str:
    """Return the bits of weights and of activations, such as W8A8, or W4-8A8 where they are mixed."""
    weights = {site(op.name, "rhs") for op in plan.ops if op.rhs_is_weight}
    sides: dict[str, set[int]] = {"W": set(), "A": set()}
    for key, quantizer in plan.quantizers.items():
        sides["W" if key in weights else "A"].add(quantizer.bits)
    spans = {side: sorted({min(bits), max(bits)}) for side, bits in sides.items() if bits}
    return "".join(f"{side}{'-'.join(map(str, span))}" for side, span in spans.items())


def facts_of(report: Report) -> tuple[tuple[str, str], ...]:
    """Return the rows of the summary: a word, and what there is to say."""
    known, plan, inspected = report.known, report.plan, report.inspected
    rows = [
        ("model", str(report.provenance.get("model", ""))),
        ("quantized", f"{bits_of(plan)}, {len(plan.ops)} products, {len(plan.grids)} sites"),
        ("left float", f"{len(plan.float_ops)} products" if plan.float_ops else "nothing"),
        ("recipe", plan.recipe),
        ("calibrated", _calibrated(report)),
    ]
    if inspected is not None:
        float_bytes = known.float_bytes or report.weight_bytes
        shapes = ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in inspected.inputs.items())
        integers, floats = len(inspected.graph.integer_products), len(inspected.graph.float_products)
        rows += [
            ("size", f"{report.bytes / 1e6:.2f} MB, float {float_bytes / 1e6:.2f} MB"),
            ("input", shapes),
            ("target", f"{inspected.target}, ptq4vit_fx {inspected.version}"),
            ("here", f"ONNX Runtime {inspected.runtime}: {integers} products of integers, {floats} in float"),
            ("CPU", str(inspected.cpu)),
        ]
    return tuple((word, text) for word, text in rows if text)


def _calibrated(report: Report) -> str:
    facts = report.provenance
    images = facts.get("images")
    if images is None:
        return ""
    seconds = facts.get("seconds")
    return f"on {images} images" + (f", in {seconds:.1f} s" if isinstance(seconds, (int, float)) else "")


def missing_of(report: Report) -> dict[str, str]:
    """Return section -> why it is not there in full, and which option brings it; nothing of what is complete."""
    known, is_file = report.known, report.inspected is not None
    found = {}
    if is_file and known.against is None:
        found["against"] = (
            "Not compared with the float model: add --data FOLDER of images and --against with the model, or its file."
        )
    elif not is_file:
        found["against"] = "A calibration says nothing of outputs: report its ONNX file, with --data and --against."
    if all(product.after is None for product in report.products):
        do = "quantize again, or add --calibration with that of the file" if is_file else "it has no product yet"
        found["costs"] = f"No figures of the search are known: {do}."
    if is_file and not report.images_seen:
        found["histograms"] = "Weights alone: for what comes to activations add --data FOLDER of images."
    elif not is_file:
        found["histograms"] = "A calibration holds scales and no values: report its ONNX file, with --data."
    found |= _missing_times(report)
    return found


def _missing_times(report: Report) -> dict[str, str]:
    known = report.known
    if report.inspected is None:
        return {"times": "A calibration is not run: report its ONNX file."}
    if known.why:
        return {"times": known.why}
    if known.times is None:
        return {"times": "Not measured: leave --no-bench out."}
    if known.float_times is None:
        return {"times": "For float beside it add --against with the float model, or its file."}
    return {}


def repeat_of(report: Report) -> tuple[str, ...]:
    """Return the commands, or the calls, that make the file again."""
    known, facts = report.known, report.provenance
    if known.command:
        return (known.command,)
    seed, loss, images = facts.get("seed", 0), facts.get("loss", "pseudo_label"), facts.get("images", 32)
    target = report.inspected.target if report.inspected is not None else "onnxruntime"
    if isinstance(facts.get("model"), str) and isinstance(facts.get("recipe"), str):
        weights = max((report.plan.quantizers[site(op.name, "rhs")].bits for op in report.plan.ops), default=8)
        inputs = max((report.plan.quantizers[site(op.name, "lhs")].bits for op in report.plan.ops), default=8)
        words = ["ptq4vit", "quantize", facts["model"], "--data", "FOLDER", "--out", report.name]
        words += ["--recipe", facts["recipe"], "--w-bits", str(weights), "--a-bits", str(inputs)]
        words += ["--images", str(images), "--seed", str(seed), "--loss", str(loss), "--target", target]
        return (shlex.join(words),)
    recipe = report.plan.recipe
    return (
        f"prepared = ptq.prepare_fx(model, ptq.recipes.{recipe}, images[:1])  # {images} images",
        f"ptq.calibrate(prepared, images, seed={seed!r}, loss={loss!r})",
        f"ptq.export_onnx(ptq.convert_fx(prepared), {report.name!r}, images[:1], target={target!r})",
    )


#: What the list of products can be sorted by: word, value of each; a product without one comes last.
ORDERS: dict[str, Callable[[ProductEntry], float | None]] = {
    "cost": lambda product: product.cost,
    "weakest operand": lambda product: None if product.weakest is None else -product.weakest,
    "share of its output": lambda product: product.share,
    "order of execution": lambda product: -float(product.order),
}
