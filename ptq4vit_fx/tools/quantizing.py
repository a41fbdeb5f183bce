"""`ptq4vit quantize`: a model by name and images in, a file and what is known of it out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from ptq4vit_fx.api import calibrate, convert_fx, load_calibration, prepare_fx
from ptq4vit_fx.calibrating.losses import has_logits
from ptq4vit_fx.data.pictures import short_name
from ptq4vit_fx.errors import PTQError, foreign
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.onnx_export import ExportReport
from ptq4vit_fx.export.proof.against_float import AgainstFloat
from ptq4vit_fx.export.proof.compare_float import compare_float
from ptq4vit_fx.export.proof.latency import SECONDS, Latency, measure_latency
from ptq4vit_fx.export.proof.operator_times import OperatorTimes, operator_times
from ptq4vit_fx.files import scratch
from ptq4vit_fx.passes.graph.contract import calibration_of, plan_of
from ptq4vit_fx.passes.graph.outputs import plain_outputs
from ptq4vit_fx.passes.graph.stages import float_products
from ptq4vit_fx.tools import phases as phase
from ptq4vit_fx.tools.advice import helpful_flags, most_expensive
from ptq4vit_fx.tools.devices import check_device
from ptq4vit_fx.tools.mappings import said_of, set_apart
from ptq4vit_fx.tools.phases import Phases
from ptq4vit_fx.tools.planning import Planned, planned
from ptq4vit_fx.tools.proving import full_batches, proved
from ptq4vit_fx.tools.reporting import report_of_summary
from ptq4vit_fx.tools.request import Request, check_request
from ptq4vit_fx.tools.schedulers import workers_at
from ptq4vit_fx.tools.source import Say, Source, read_source
from ptq4vit_fx.tools.summary import Summary
from ptq4vit_fx.tools.tuned_request import tuned_model, with_chosen_twins


@dataclass(frozen=True)
class FloatFile:
    """The float model as a file: its bytes, None of none; the latency of the file beside it, or why there is none.

    times: of its operators, where a report asks for them.
    """

    bytes: int | None = None
    latency: Latency | None = None
    problem: str = ""
    times: OperatorTimes | None = None


def quantize_folder(request: Request, say: Say, phases: Phases, *, heard: Sequence[str]) -> Summary:
    """Quantize, write, verify and compare with float; return what came of it.

    say: prints a line that cannot wait. phases: shows what is under way. heard: the warnings so far, a list that grows.
    Raises PTQError on anything that cannot be done; what can be checked is checked before the work.
    """
    check_request(request)
    source = read_source(request, say, phases)
    with workers_at(request.scheduler) as workers:
        prepared = _calibrated(request, source, say, phases, workers)
    with phases(phase.CONVERT):
        converted = convert_fx(prepared)
    example, target, opset, batch = source.pixels[:1], request.target, request.opset, request.batch
    with phases(phase.EXPORT):
        options = {"target": target, "opset": opset, "batch": batch}
        exported = request.destination.write(converted, example, source.labels, source.preprocessing, **options)
    with phases(phase.VERIFY):
        batches = full_batches(source.pixels, request.batch, request.batch_size)
        verified = proved(exported.path, converted, batches, phases.show)
    with phases(phase.COMPARE):
        against = _against_float(request, source, exported, phases)
    request.destination.note(exported, verified, _figures(request, source) | {"against float": against.headline()})
    float_file = _float_file(request, source, exported, phases)
    plan, calibration = plan_of(prepared), calibration_of(prepared)
    assert calibration is not None
    chosen, alone = "tuned" in calibration.provenance, len(plan.quantizers) - len(plan.grids)
    asked = request if chosen or request.twins != "auto" else replace(request, twins="exact")
    summary = Summary(
        model=request.model,
        bits=(request.w_bits, request.a_bits),
        products=len(plan.ops),
        set_apart=set_apart(request.mapping, plan),
        sites=len(plan.grids),
        images=len(source.pixels),
        skipped=source.skipped,
        seconds=float(calibration.provenance["seconds"]),
        exported=exported,
        verified=verified,
        against=against,
        why_seen=source.compared.reason,
        latency=float_file.latency,
        why_no_latency=float_file.problem,
        float_file=request.float_onnx,
        float_bytes=float_file.bytes or exported.float_bytes,
        expensive=most_expensive(calibration),
        flags=helpful_flags(asked, source.compared.others),
        warnings=tuple(heard),
        report=request.report,
        phases=phases.seconds,
        file_batch=request.batch,
        left_float=len(float_products(converted)) - alone,
        weights_alone=alone,
    )
    if request.report is not None:
        with phases(phase.REPORT):
            report_of_summary(summary, float_file.times, source.compared.pixels, request)
    return summary


def _against_float(request: Request, source: Source, exported: ExportReport, phases: Phases) -> AgainstFloat:
    compared = source.compared
    batches = list(torch.split(compared.pixels, request.batch_size))
    names = [short_name(picture, request.data) for picture in compared.pictures]
    known: dict[str, Any] = {"kind": request.kind, "names": names, "unseen": compared.unseen}
    return compare_float(exported.path, source.network, batches, **known, progress=phases.show)


def plan_folder(request: Request, say: Say, phases: Phases) -> Planned:
    """Return what `quantize_folder` would do, without doing it; raises PTQError on what it would refuse."""
    check_request(request)
    source = read_source(request, say, phases)
    with phases(phase.TRACE):
        return planned(request, source)


def _calibrated(request: Request, source: Source, say: Say, phases: Phases, workers: dict[str, Any]) -> GraphModule:
    """Return the prepared model with its scales, which say in their provenance what they are of.

    workers: arguments of `calibrate` that say where its work is done.
    """
    with phases(phase.TRACE, phase.PER_MODULE * len(list(source.network.modules()))):
        prepared = prepare_fx(source.network, request.mapping, source.pixels[:1], skip=request.skip)
    for line in said_of(request.settings, request.skip, plan_of(prepared)):
        say(line)
    request.destination.check_names(prepared)
    batches = list(torch.split(source.pixels, request.batch_size))
    options: dict[str, Any] = {
        "seed": request.seed,
        "loss": request.loss or _loss_of(request, source),
        "memory_limit": request.memory_limit,
        "device": check_device(request.device),
        "sequential": request.sequential,
        "progress": phases.show,
        **workers,
    }
    if request.agreement is not None:
        with phases(phase.TUNE):
            prepared = tuned_model(request, prepared, batches, source.tuned_on, say, kind=source.kind, **options)
    elif request.twins == "auto":
        with phases(phase.CALIBRATE):
            prepared = with_chosen_twins(request, prepared, batches, source.tuned_on, say, source.kind, **options)
    else:
        with phases(phase.CALIBRATE):
            calibrate(prepared, batches, checkpoint=request.checkpoint, **options)
    calibration = calibration_of(prepared)
    assert calibration is not None
    return load_calibration(
        prepared, replace(calibration, provenance=calibration.provenance | _origin(request, source))
    )


def _loss_of(request: Request, source: Source) -> str | None:
    """Return the loss of outputs that are no logits, which have a direction; None for what the recipe says."""
    if request.mapping.loss == "projection":
        return None
    if source.kind in ("embeddings", "values"):
        return "projection"
    expected, do = "a model that runs on these images", "check its image size, and --model-arg"
    with torch.inference_mode(), foreign("quantize", type(source.network).__name__, expected=expected, do=do):
        output = plain_outputs(source.network(source.pixels[:1]), keys=True)
    return None if has_logits(output) else "projection"


def _origin(request: Request, source: Source) -> dict[str, Any]:
    facts = request.asked().origin() | request.image_options.origin()
    facts |= {"recipe": request.recipe, "preprocessing": source.preprocessing}
    return facts if source.kind is None else facts | {"output": source.kind}


def _figures(request: Request, source: Source) -> dict[str, str]:
    bits = f"W{request.w_bits}A{request.a_bits}, recipe {request.recipe}, {len(source.pixels)} images"
    return {"model": request.model, "bits": bits}


def _float_file(request: Request, source: Source, exported: ExportReport, phases: Phases) -> FloatFile:
    """Write the float file where it is asked for, else into a temporary folder, and measure the file beside it.

    That a measurement does not work out is no error: the file is written. Raises PTQError if a float file is asked for
    and cannot be written.
    """
    if request.float_onnx is None and not request.bench:
        return FloatFile(problem="not measured, --no-bench")
    size = sum(tensor.nbytes for tensor in source.network.state_dict().values())
    with contextlib.nullcontext() if request.float_onnx else scratch("quantize", size) as folder:
        path = request.float_onnx or f"{folder}/float.onnx"
        example, written = source.pixels[:1], None
        known: dict[str, Any] = {"opset": request.opset, "batch": request.batch, "facts": _origin(request, source)}
        known |= request.destination.interface(exported)
        try:
            with phases(phase.FLOAT):
                written = export_float(source.network, path, example, **known)
            if not request.bench:
                return FloatFile(written, problem="not measured, --no-bench")
            with phases(phase.MEASURE, 2 * SECONDS):
                times = None if request.report is None else operator_times(path)
                return FloatFile(written, measure_latency(exported.path, path), times=times)
        except PTQError as error:
            if request.float_onnx is not None and written is None:
                raise
            return FloatFile(written, problem=f"not measured: {error}")
