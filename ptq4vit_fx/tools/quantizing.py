"""`ptq4vit quantize`: a model by name and a folder of images in, a file and what is known of it out."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vit_fx.api import calibrate, convert_fx, load_calibration, prepare_fx
from ptq4vit_fx.calibrating.losses import has_logits
from ptq4vit_fx.errors import PTQError, foreign
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.proof.against_float import Kind
from ptq4vit_fx.export.proof.compare_float import compare_float
from ptq4vit_fx.export.proof.latency import Latency, measure_latency
from ptq4vit_fx.export.proof.operator_times import OperatorTimes, operator_times
from ptq4vit_fx.export.proof.verify import verify_onnx
from ptq4vit_fx.files import scratch
from ptq4vit_fx.inputs.sizes import COPIES, FLOAT_BYTES, check_memory
from ptq4vit_fx.passes.graph.contract import calibration_of, plan_of
from ptq4vit_fx.passes.graph.outputs import plain_outputs
from ptq4vit_fx.tools.advice import helpful_flags, most_expensive
from ptq4vit_fx.tools.devices import check_device
from ptq4vit_fx.tools.held_out import Compared, images_to_compare
from ptq4vit_fx.tools.mappings import said_of, set_apart
from ptq4vit_fx.tools.models import evenly_spread, list_images, load_named, said_of_skipped
from ptq4vit_fx.tools.named.kinds import load_model
from ptq4vit_fx.tools.planning import Planned, planned
from ptq4vit_fx.tools.reporting import report_of_summary
from ptq4vit_fx.tools.request import Request, check_request
from ptq4vit_fx.tools.summary import Summary
from ptq4vit_fx.tools.tuned_request import tuned_model
from ptq4vit_fx.twins import choose_twins

Say = Callable[[str], None]
#: Shows what is under way while it lasts.
Status = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Source:
    """The float model, how its images are prepared, and those that were read; skipped: `path: reason` of the others.

    kind: what its output is, None where neither the user nor the model says it.
    """

    network: nn.Module
    labels: list[str] | None
    preprocessing: dict[str, Any]
    pixels: Tensor
    skipped: tuple[str, ...]
    compared: Compared
    kind: Kind | None
    tuned_on: Compared | None = None


@dataclass(frozen=True)
class FloatFile:
    """The float model as a file: its bytes, None of none; the latency of the file beside it, or why there is none.

    times: of its operators, where a report asks for them.
    """

    bytes: int | None = None
    latency: Latency | None = None
    problem: str = ""
    times: OperatorTimes | None = None


def quantize_folder(request: Request, say: Say, status: Status, *, progress: bool, heard: Sequence[str]) -> Summary:
    """Quantize, write, verify and compare with float; return what came of it.

    say: prints a line that cannot wait. progress: show that of the calibration. heard: the warnings so far, a list that
    grows. Raises PTQError on anything that cannot be done; what can be checked is checked before the work.
    """
    check_request(request)
    source = _source(request, say, status)
    prepared = _calibrated(request, source, say, progress=progress)
    converted = convert_fx(prepared)
    example, target, opset, batch = source.pixels[:1], request.target, request.opset, request.batch
    with status("export to ONNX"):
        options = {"target": target, "opset": opset, "batch": batch}
        exported = request.destination.write(converted, example, source.labels, source.preprocessing, **options)
    with status("verify in ONNX Runtime"):
        verified = verify_onnx(exported.path, converted, _full_batches(source.pixels, request))
    compared = source.compared
    with status("compare with float"):
        batches = list(torch.split(compared.pixels, request.batch_size))
        kind, names = request.kind, [os.path.relpath(name, request.data) for name in compared.names]
        against = compare_float(exported.path, source.network, batches, kind=kind, names=names, unseen=compared.unseen)
    request.destination.note(exported, verified, _figures(request, source) | {"against float": against.headline()})
    float_file = _float_file(request, source, exported.path, status)
    plan, calibration = plan_of(prepared), calibration_of(prepared)
    assert calibration is not None
    summary = Summary(
        model=request.model,
        bits=(request.w_bits, request.a_bits),
        products=len(plan.ops),
        set_apart=set_apart(request.mapping, plan),
        sites=len(plan.quantizers),
        images=len(source.pixels),
        skipped=source.skipped,
        seconds=float(calibration.provenance["seconds"]),
        exported=exported,
        verified=verified,
        against=against,
        why_seen=compared.reason,
        latency=float_file.latency,
        why_no_latency=float_file.problem,
        float_file=request.float_onnx,
        float_bytes=float_file.bytes or exported.float_bytes,
        expensive=most_expensive(calibration),
        flags=helpful_flags(request, compared.others),
        warnings=tuple(heard),
        report=request.report,
    )
    if request.report is not None:
        with status("write the report"):
            report_of_summary(summary, float_file.times, compared.pixels, request)
    return summary


def plan_folder(request: Request, say: Say, status: Status) -> Planned:
    """Return what `quantize_folder` would do, without doing it; raises PTQError on what it would refuse."""
    check_request(request)
    return planned(request, _source(request, say, status))


def _source(request: Request, say: Say, status: Status) -> Source:
    """Read the model and the images; calibration takes some, evenly spread over the folder, a comparison others."""
    listed = list_images(request.data)
    named = load_model(request.asked())
    for line in named.said:
        say(line)
    preprocessing = named.preprocessing
    labels = request.destination.class_names(named.network) or (list(named.labels) if named.labels else None)
    channels = preprocessing["input_size"][0]
    if request.batch is not None:
        size, what = (
            COPIES * FLOAT_BYTES * request.batch * math.prod(preprocessing["input_size"]),
            "so many images at once",
        )
        check_memory("quantize", f"--batch {request.batch}", size, what=what, do="choose a smaller one")
    if channels == 1:
        mean, std = (preprocessing[key][0] for key in ("mean", "std"))
        say(f"images are read as gray, mean {mean:g} and std {std:g}: the averages of the three channels")
    transform, skipped = timm.data.create_transform(**preprocessing), list[str]()
    with status("read images"):
        taken = evenly_spread(listed.paths, request.images)
        calibrated = load_named(taken, transform, skipped, channels)
        compared = images_to_compare(listed.paths, taken, calibrated, transform, channels)
        tuned_on = None
        if request.agreement is not None:  # others than those of the last comparison, where there are enough
            seen = (*taken, *map(Path, compared.names))
            tuned_on = images_to_compare(listed.paths, seen, calibrated, transform, channels)
            tuned_on = tuned_on if tuned_on.unseen else compared
    if skipped:
        say(said_of_skipped(skipped))
    kind = request.kind or named.kind
    return Source(named.network, labels, preprocessing, calibrated[1], tuple(skipped), compared, kind, tuned_on)


def _calibrated(request: Request, source: Source, say: Say, *, progress: bool) -> GraphModule:
    """Return the prepared model with its scales, which say in their provenance what they are of."""
    prepared = prepare_fx(source.network, request.mapping, source.pixels[:1], skip=request.skip)
    for line in said_of(request.settings, request.skip, plan_of(prepared)):
        say(line)
    request.destination.check_names(prepared)
    batches = list(torch.split(source.pixels, request.batch_size))
    options: dict[str, Any] = {
        "seed": request.seed,
        "loss": request.loss or _loss_of(source),
        "memory_limit": None if request.memory_limit is None else round(request.memory_limit * 2**30),
        "device": check_device(request.device),
        "sequential": request.sequential,
        "progress": progress,
    }
    if request.agreement is None:
        calibrate(prepared, batches, checkpoint=request.checkpoint, **options)
    else:
        prepared = tuned_model(request, prepared, batches, source.tuned_on, say, kind=source.kind, **options)
    if request.twins == "auto":
        prepared, choice = choose_twins(prepared, batches, **options)
        say(str(choice))
    calibration = calibration_of(prepared)
    assert calibration is not None
    return load_calibration(
        prepared, replace(calibration, provenance=calibration.provenance | _origin(request, source))
    )


def _loss_of(source: Source) -> str:
    """Return the loss that goes with what the model gives: logits have a label, other outputs a direction."""
    if source.kind in ("embeddings", "values"):
        return "projection"
    expected, do = "a model that runs on these images", "check its image size, and --model-arg"
    with torch.inference_mode(), foreign("quantize", type(source.network).__name__, expected=expected, do=do):
        output = plain_outputs(source.network(source.pixels[:1]), keys=True)
    return "pseudo_label" if has_logits(output) else "projection"


def _origin(request: Request, source: Source) -> dict[str, Any]:
    facts = request.asked().origin() | {"recipe": request.recipe, "preprocessing": source.preprocessing}
    return facts if source.kind is None else facts | {"output": source.kind}


def _figures(request: Request, source: Source) -> dict[str, str]:
    bits = f"W{request.w_bits}A{request.a_bits}, recipe {request.recipe}, {len(source.pixels)} images"
    return {"model": request.model, "bits": bits}


def _full_batches(pixels: Tensor, request: Request) -> list[Tensor]:
    """Return the images in batches that the file takes: of a fixed batch, the first images fill up the last one."""
    if request.batch is None:
        return list(torch.split(pixels, request.batch_size))
    count = -(-len(pixels) // request.batch) * request.batch
    return list(torch.split(pixels[torch.arange(count) % len(pixels)], request.batch))


def _float_file(request: Request, source: Source, file: Path, status: Status) -> FloatFile:
    """Write the float file where it is asked for, else into a temporary folder, and measure the file beside it.

    That a measurement does not work out is no error: the file is written. Raises PTQError if a float file is asked for
    and cannot be written.
    """
    if request.float_onnx is None and not request.bench:
        return FloatFile(problem="not measured, --no-bench")
    size = sum(tensor.nbytes for tensor in source.network.state_dict().values())
    with contextlib.nullcontext() if request.float_onnx else scratch("quantize", size) as folder:
        path = request.float_onnx or f"{folder}/float.onnx"
        example, facts = source.pixels[:1], _origin(request, source)
        written = None
        try:
            with status("write the float file"):
                said: dict[str, Any] = {"opset": request.opset, "batch": request.batch, **request.destination.names}
                written = export_float(source.network, path, example, facts=facts, **said)
            if not request.bench:
                return FloatFile(written, problem="not measured, --no-bench")
            with status("measure"):
                times = None if request.report is None else operator_times(path)
                return FloatFile(written, measure_latency(file, path), times=times)
        except PTQError as error:
            if request.float_onnx is not None and written is None:
                raise
            return FloatFile(written, problem=f"not measured: {error}")
