"""`ptq4vit quantize`: a model by name and images in, a file and what is known of it out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vit_fx.api import calibrate, convert_fx, load_calibration, prepare_fx
from ptq4vit_fx.data.pictures import Images, check_float_shape, evenly_spread, short_name
from ptq4vit_fx.data.preprocessing import data_config, transform_of
from ptq4vit_fx.data.reading import load_named, said_of_skipped
from ptq4vit_fx.data.sources import open_images
from ptq4vit_fx.errors import PTQError
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.proof.compare_float import compare_float
from ptq4vit_fx.export.proof.latency import Latency, measure_latency
from ptq4vit_fx.export.proof.outputs import COPIES, FLOAT_BYTES
from ptq4vit_fx.export.proof.verify import verify_onnx
from ptq4vit_fx.files import scratch
from ptq4vit_fx.inputs.batches import SHOWN_AFTER
from ptq4vit_fx.inputs.sizes import check_memory
from ptq4vit_fx.passes.graph.contract import calibration_of, plan_of
from ptq4vit_fx.tools.advice import helpful_flags, most_expensive
from ptq4vit_fx.tools.held_out import Compared, images_to_compare
from ptq4vit_fx.tools.models import create_model
from ptq4vit_fx.tools.request import Request, check_request
from ptq4vit_fx.tools.summary import Summary
from ptq4vit_fx.twins import choose_twins

Say = Callable[[str], None]
#: Shows what is under way while it lasts.
Status = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Source:
    """The float model, how its images are prepared, and those that were read; skipped: `path: reason` of the others."""

    network: nn.Module
    labels: list[str] | None
    preprocessing: dict[str, Any]
    pixels: Tensor
    skipped: tuple[str, ...]
    compared: Compared


@dataclass(frozen=True)
class FloatFile:
    """The float model as a file: its bytes, None of none; the latency of the file beside it, or why there is none."""

    bytes: int | None = None
    latency: Latency | None = None
    problem: str = ""


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
        kind, names = request.kind, [short_name(picture, request.data) for picture in compared.pictures]
        against = compare_float(exported.path, source.network, batches, kind=kind, names=names, unseen=compared.unseen)
    request.destination.note(exported, verified, _figures(request, source) | {"against float": against.headline()})
    float_file = _float_file(request, source, exported.path, status)
    plan, calibration = plan_of(prepared), calibration_of(prepared)
    assert calibration is not None
    return Summary(
        model=request.model,
        bits=(request.w_bits, request.a_bits),
        products=len(plan.ops),
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
        file_batch=request.batch,
    )


def _source(request: Request, say: Say, status: Status) -> Source:
    """Read the model and the images; calibration takes some, evenly spread over the data, a comparison others."""
    with status("find images"):
        listed = open_images(request.data)
    said: list[str] = []
    create = partial(create_model, request.model, request.weights, entry=request.weights_entry, said=said)
    network = request.image_options.build(create, request.model_args)
    for line in said:
        say(line)
    labels = request.destination.class_names(network)
    preprocessing = request.image_options.applied(data_config(network), request.model_args)
    _check_size(request, preprocessing["input_size"], min(len(listed.items), request.images))
    if preprocessing["input_size"][0] == 1:
        mean, std = (preprocessing[key][0] for key in ("mean", "std"))
        say(f"images are read as gray, mean {mean:g} and std {std:g}: the averages of the three channels")
    check_float_shape(listed, tuple(preprocessing["input_size"]), request.data)
    pixels, skipped, compared = _read(request, listed, preprocessing, status)
    if skipped:
        say(said_of_skipped(skipped))
    return Source(network, labels, preprocessing, pixels, tuple(skipped), compared)


def _check_size(request: Request, size: Sequence[int], images: int) -> None:
    """Raise PTQError if memory does not hold so many images, (channels, height, width), or a fixed batch of them."""
    one, do = FLOAT_BYTES * math.prod(size), "choose a smaller one"
    if request.batch is not None:
        held, what = COPIES * one * request.batch, "so many images at once"
        check_memory("quantize", f"--file-batch {request.batch}", held, what=what, do=do)
    what, do = f"{images} images of {size[1]} x {size[2]} pixels", "choose smaller ones, or fewer with --images"
    check_memory("quantize", "images", one * images, what=what, do=do)


def _read(
    request: Request, listed: Images, preprocessing: dict[str, Any], status: Status
) -> tuple[Tensor, list[str], Compared]:
    """Return the pixels to calibrate on, what was skipped of them, and the images to compare on."""
    transform, channels = transform_of(preprocessing), preprocessing["input_size"][0]
    taken, skipped = evenly_spread(len(listed.items), request.images), list[str]()
    started = time.monotonic()
    with status("read images") as shown:

        def show(count: int, before: int = 0) -> None:
            if shown is not None and time.monotonic() - started > SHOWN_AFTER:
                shown.update(f"read images: {before + count}")

        chosen = [listed.items[number] for number in taken]
        calibrated = load_named(chosen, transform, skipped, channels, show)
        further = partial(show, before=len(taken))
        compared = images_to_compare(listed.items, taken, calibrated, transform, channels, further)
    return calibrated[1], skipped, compared


def _calibrated(request: Request, source: Source, say: Say, *, progress: bool) -> GraphModule:
    """Return the prepared model with its scales, which say in their provenance what they are of."""
    prepared = prepare_fx(source.network, request.mapping, source.pixels[:1], skip=request.skip)
    batches = list(torch.split(source.pixels, request.batch_size))
    limit = request.memory_limit
    seed, loss = request.seed, request.loss
    calibrate(
        prepared, batches, seed=seed, loss=loss, checkpoint=request.checkpoint, memory_limit=limit, progress=progress
    )
    if request.twins == "auto":
        prepared, choice = choose_twins(prepared, batches, seed=seed, loss=loss, memory_limit=limit, progress=progress)
        say(str(choice))
    calibration = calibration_of(prepared)
    assert calibration is not None
    return load_calibration(
        prepared, replace(calibration, provenance=calibration.provenance | _origin(request, source))
    )


def _origin(request: Request, source: Source) -> dict[str, Any]:
    return {"model": request.model, "recipe": request.recipe, "preprocessing": source.preprocessing}


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
                written = export_float(
                    source.network, path, example, opset=request.opset, batch=request.batch, facts=facts
                )
            if not request.bench:
                return FloatFile(written, problem="not measured, --no-bench")
            with status("measure"):
                return FloatFile(written, measure_latency(file, path))
        except PTQError as error:
            if request.float_onnx is not None and written is None:
                raise
            return FloatFile(written, problem=f"not measured: {error}")
