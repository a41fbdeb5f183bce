"""What `ptq4vit quantize` starts from: the float model, and the images of the calibration and of the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import huggingface_hub
from torch import Tensor, nn

from ptq4vit_fx.data.pictures import Images, check_float_shape, evenly_spread
from ptq4vit_fx.data.preprocessing import transform_of
from ptq4vit_fx.data.reading import load_named, said_of_skipped
from ptq4vit_fx.data.sources import open_images
from ptq4vit_fx.export.proof.against_float import Kind
from ptq4vit_fx.inputs.sizes import COPIES, FLOAT_BYTES, check_memory
from ptq4vit_fx.tools import phases as phase
from ptq4vit_fx.tools.held_out import MOST, Compared, images_to_compare
from ptq4vit_fx.tools.phases import Phases, calls
from ptq4vit_fx.tools.request import Request

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """The float model, how its images are prepared, and those that were read; skipped: `path: reason` of the others.

    kind: what its output is, None where neither the user nor the model says it. tuned_on: what `tune` measures on.
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
class Read:
    """The pixels to calibrate on, what was skipped of them, and the images to compare and to tune on."""

    pixels: Tensor
    skipped: tuple[str, ...]
    compared: Compared
    tuned_on: Compared | None


def read_source(request: Request, say: Say, phases: Phases) -> Source:
    """Read the model and the images; calibration takes some, evenly spread over the data, a comparison others.

    Raises PTQError on a model or data that cannot be read, and on sizes that the memory or the model does not hold.
    """
    with phases(phase.READ):
        listed = open_images(request.data)
    if not phases.drawn:
        huggingface_hub.utils.disable_progress_bars()  # the hub's own bars are for terminals
    with phases(phase.MODEL, drawn=False):
        named = request.image_options.build(request.asked())
    for line in named.said:
        say(line)
    preprocessing = request.image_options.applied(named.preprocessing, request.model_args)
    labels = request.destination.class_names(named.network) or (list(named.labels) if named.labels else None)
    _check_size(request, preprocessing["input_size"], min(len(listed.items), request.images))
    request.image_options.check_taken(named.network, preprocessing["input_size"])
    if preprocessing["input_size"][0] == 1:
        mean, std = (preprocessing[key][0] for key in ("mean", "std"))
        say(f"images are read as gray, mean {mean:g} and std {std:g}: the averages of the three channels")
    check_float_shape(listed, tuple(preprocessing["input_size"]), request.data)
    with phases(phase.READ):
        read = _read(request, listed, preprocessing, phases)
    if read.skipped:
        say(said_of_skipped(read.skipped))
    kind = request.kind or named.kind
    return Source(named.network, labels, preprocessing, read.pixels, read.skipped, read.compared, kind, read.tuned_on)


def _check_size(request: Request, size: Sequence[int], images: int) -> None:
    """Raise PTQError if memory does not hold so many images, (channels, height, width), or a fixed batch of them."""
    one, do = FLOAT_BYTES * math.prod(size), "choose a smaller one"
    if request.batch is not None:
        held, what = COPIES * one * request.batch, "so many images at once"
        check_memory("quantize", f"--file-batch {request.batch}", held, what=what, do=do)
    what, do = f"{images} images of {size[1]} x {size[2]} pixels", "choose smaller ones, or fewer with --images"
    check_memory("quantize", "images", one * images, what=what, do=do)


def _read(request: Request, listed: Images, preprocessing: dict[str, Any], phases: Phases) -> Read:
    items, channels, skipped = listed.items, preprocessing["input_size"][0], list[str]()
    taken = evenly_spread(len(items), request.images)
    total = min(len(items), len(taken) + MOST * (2 if request.tunes else 1))
    transform = calls(transform_of(preprocessing), phases.show, phase.READ, total)
    calibrated = load_named([items[number] for number in taken], transform, skipped, channels)
    compared = images_to_compare(items, taken, calibrated, transform, channels)
    tuned_on = None
    if request.tunes:  # others than those of the last comparison, where there are enough
        tuned_on = images_to_compare(items, (*taken, *compared.numbers), calibrated, transform, channels)
        tuned_on = tuned_on if tuned_on.unseen else compared
    return Read(calibrated[1], tuple(skipped), compared, tuned_on)
