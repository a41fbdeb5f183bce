"""Read a quantized ONNX file back: every site's quantizer and scales, and what the runtime will do with it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx_ir as ir
import onnxruntime

from ptq4vit_fx import names
from ptq4vit_fx.errors import failure, printable
from ptq4vit_fx.export.metadata import CALIBRATION_KEY, PLAN_KEY, TARGET_KEY, VERSION_KEY
from ptq4vit_fx.export.model_files import load_file, unreadable
from ptq4vit_fx.export.nodes import name_of
from ptq4vit_fx.export.proof.instructions import Instructions, cpu_instructions
from ptq4vit_fx.export.proof.runtime_graph import RuntimeGraph, RuntimeProduct, runtime_graph, traps_met
from ptq4vit_fx.export.stored_sites import StoredSite, stored_sites
from ptq4vit_fx.export.traps import SATURATION, Trap
from ptq4vit_fx.plan import FloatOp, QuantPlan
from ptq4vit_fx.quantizers import Quantizer, TwinUniform, describe_quantizer


@dataclass(frozen=True)
class SiteRecord:
    """One site as stored: scales are (smallest, largest), or (fine, coarse) of a twin; threshold: of a twin."""

    site: str
    quantizer: str
    scales: tuple[float, float]
    threshold: float | None
    merged_with: str | None

    @property
    def scale_text(self) -> str:
        """The scales in few characters."""
        first, second = (f"{scale:.4g}" for scale in self.scales)
        if self.threshold is not None:
            return f"{first} | {second}"
        return first if self.scales[0] == self.scales[1] else f"{first} .. {second}"

    def __str__(self) -> str:
        note = "" if self.threshold is None else f"{self.threshold:.4g}"
        if self.merged_with is not None:
            note = f"{note} one quantizer with {self.merged_with}".strip()
        return f"{self.site:40}{self.quantizer:24}{self.scale_text:>26}  {note}".rstrip()


@dataclass(frozen=True)
class FileReport:
    """What `ptq4vit inspect` tells. inputs: name -> shape, with "any" for the batch, which may vary.

    traps: of runtimes, into which the file falls here; of OpenVINO by what the file says.
    """

    version: str
    target: str
    calibration: str
    inputs: dict[str, tuple[int | str, ...]]
    sites: tuple[SiteRecord, ...]
    float_ops: tuple[FloatOp, ...]
    graph: RuntimeGraph
    runtime: str
    cpu: Instructions
    traps: tuple[Trap, ...]

    def to_json(self) -> str:
        """Return everything as JSON text, of which a terminal obeys nothing: names come out of the file."""
        return json.dumps(asdict(self), indent=1).replace("\x7f", r"\u007f")

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in self.inputs.items())
        lines = [
            f"ptq4vit_fx {self.version}, target {self.target}, calibration {self.calibration}, input {shapes}",
            f"{'site':40}{'quantizer':24}{'scale':>26}  threshold",
            *map(str, self.sites),
            *(f"{op.name:40}float: {op.reason}" for op in self.float_ops),
            f"ONNX Runtime {self.runtime}, the file as it is, on this machine: {len(self.graph.integer_products)} "
            f"integer products, {len(self.graph.float_products)} in float",
        ]
        for product in self.graph.products:
            kind = "integer" if product.integer else "float"
            lines.append(f"  {kind:8}{product.name:40}{product.operator:22}{product.types:16}{product.reason}")
        lines.append(f"{len(self.graph.leftovers)} DequantizeLinear of codes left in the optimized graph")
        lines += [f"  {leftover}" for leftover in self.graph.leftovers]
        lines.append(str(self.cpu))
        if self.cpu.saturates and not any(trap.name == SATURATION.name for trap in self.traps):
            lines.append("  this file has no int8 weight that is large enough to saturate: its results are exact here")
        lines += [f"trap: {trap}" for trap in self.traps]
        return "\n".join(map(printable, lines))


def inspect_file(path: str | os.PathLike[str]) -> FileReport:
    """Return what is in a file and what ONNX Runtime makes of it on this machine.

    Raises PTQError if the file does not come from this package, or if a site of its plan is not in its graph.
    """
    model = load_file(path)
    with unreadable("inspect", path, "a file that export_onnx wrote"):
        return _report(model, str(path))


def _report(model: ir.Model, path: str) -> FileReport:
    properties = model.metadata_props
    if PLAN_KEY not in properties:
        raise failure(
            "inspect",
            path,
            expected="a file with a quantization plan",
            got="none in its metadata",
            do="pass a file that export_onnx wrote",
        )
    plan = QuantPlan.from_json(properties[PLAN_KEY], "inspect", path)
    graph = _with_planned_reasons(runtime_graph(model), plan)  # first: the runtime knows what is wrong with a graph
    stored, cpu = stored_sites(model, "inspect", path), cpu_instructions()
    return FileReport(
        version=properties.get(VERSION_KEY, "unknown"),
        target=properties.get(TARGET_KEY, "unknown"),
        calibration=properties.get(CALIBRATION_KEY, "unknown"),
        inputs={name_of(value): _shape(value) for value in model.graph.inputs},
        sites=tuple(_record(site, quantizer, stored, path) for site, quantizer in plan.grids.items()),
        float_ops=plan.float_ops,
        graph=graph,
        runtime=onnxruntime.__version__,
        cpu=cpu,
        traps=traps_met(model, graph, saturates=cpu.saturates),
    )


def _with_planned_reasons(graph: RuntimeGraph, plan: QuantPlan) -> RuntimeGraph:
    """Give products that the plan left float the plan's reason: the runtime's graph only shows that they are."""
    reasons = {op.name: op.reason for op in plan.float_ops}

    def explained(product: RuntimeProduct) -> RuntimeProduct:
        reason = reasons.get(names.path_of(product.name))
        return product if reason is None or product.integer else replace(product, reason=f"left float: {reason}")

    return replace(graph, products=tuple(map(explained, graph.products)))


def _shape(value: ir.Value) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else "any" for size in value.shape or ())


def _record(site: str, quantizer: Quantizer, stored: dict[str, StoredSite], path: str) -> SiteRecord:
    scopes = [names.branch(site, part) for part in (names.RANGES if isinstance(quantizer, TwinUniform) else (None,))]
    missing = [scope for scope in scopes if scope not in stored]
    if missing:
        raise failure(
            "inspect",
            f"{path}: site {missing[0]}",
            expected="a quantizer or a weight of that name in the graph",
            got="none",
            do="export the file again: another program has rewritten its graph or its names",
        )
    found = [stored[scope] for scope in scopes]
    merged = next((one.source for scope, one in zip(scopes, found, strict=True) if one.source != scope), None)
    if isinstance(quantizer, TwinUniform):
        fine, coarse = (float(one.scale) for one in found)
        threshold = fine * quantizer.steps if quantizer.form == "softmax" else 0.0
        return SiteRecord(site, describe_quantizer(quantizer), (fine, coarse), threshold, merged)
    scale = found[0].scale if found[0].calibrated is None else found[0].calibrated
    limits = float(np.min(scale)), float(np.max(scale))
    return SiteRecord(site, describe_quantizer(quantizer), limits, None, merged)
