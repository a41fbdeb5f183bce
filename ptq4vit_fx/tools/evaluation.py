"""Accuracy of an ONNX file on labelled images, by itself and beside the float model."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ptq4vit_fx.data.classes import class_number, class_numbers
from ptq4vit_fx.data.image_files import MODES
from ptq4vit_fx.data.pictures import Images, check_float_shape
from ptq4vit_fx.data.preprocessing import at_size, data_config, transform_of
from ptq4vit_fx.data.reading import read_images
from ptq4vit_fx.data.sources import open_images
from ptq4vit_fx.errors import failure, some_names, warn
from ptq4vit_fx.export.pixels import image_shape, pixels_of
from ptq4vit_fx.export.preprocessing import recorded
from ptq4vit_fx.export.proof.outputs import COPIES, FLOAT_BYTES, fixed_batch
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.inputs.sizes import check_memory
from ptq4vit_fx.tools.classifiers import Array, Classifier, classifier_of
from ptq4vit_fx.tools.image_options import ImageOptions
from ptq4vit_fx.tools.models import check_name
from ptq4vit_fx.tools.scores import Evaluation, classes_of, pair_of, ranks, score_of
from ptq4vit_fx.torch_state import independent_of_caller

#: Pictures become pixels as the file says.
AS_RECORDED = ImageOptions()


@independent_of_caller()
def evaluate_file(
    file: Path,
    data: Path,
    model: str | None,
    batch_size: int,
    console: Console,
    reference: Classifier | None = None,
    options: ImageOptions = AS_RECORDED,
) -> Evaluation:
    """Classify every image of `data`, which are labelled, with the preprocessing that the file records.

    model: a timm model whose preprocessing to use instead. reference: the float model, which sees the same images.
    options: what of the preprocessing is to be another.
    Raises PTQError if no preprocessing is known, if the file takes something else than images, or if the number of
    sub-folders is not the number of classes (unless the sub-folders are named by class number). Warns (PTQWarning) of
    sub-folders without images.
    """
    session = open_session(file)
    channels = _image_channels(session, file)
    classify = classifier_of(session, file)
    folder = open_images(data, labelled=True)
    config = _preprocessing(session, file, model, options)
    check_float_shape(folder, tuple(config["input_size"]), data)
    transform = transform_of(config)
    _warn_of_empty(folder, data)
    labels, skipped = np.asarray(folder.labels), list[str]()
    seen = list[Array]()  # per batch: the numbers of the images, both ranks, whether the first classes are the same
    classes = 0
    # A bar that is switched off prints an empty line in older releases of rich.
    bar = track(folder.items, "eval", console=console) if console.is_terminal else folder.items
    size = fixed_batch("eval", str(file), session) or batch_size
    for numbers, pixels in _batches(read_images(bar, transform, skipped, channels), size):
        logits = classify(pixels)
        classes = logits.shape[1]
        _check_classes(folder, classes, data)
        beside = logits if reference is None else reference(pixels)
        if beside.shape != logits.shape:
            expected, do = f"logits of the shape {logits.shape}, as the file's", "pass the model that it was made from"
            raise failure("eval", "--against", expected=expected, got=str(beside.shape), do=do)
        same = logits.argmax(1) == beside.argmax(1)
        seen.append(np.stack([numbers, ranks(logits, labels[numbers]), ranks(beside, labels[numbers]), same]))
    if not seen:
        return Evaluation(0, tuple(skipped))
    images, rank, float_rank, same = np.concatenate(seen, axis=1)
    found = Evaluation(len(images), tuple(skipped), score_of(rank, classes))
    if reference is None:
        return found
    return replace(
        found,
        float_score=score_of(float_rank, classes),
        pair=pair_of(rank, float_rank, int(same.sum())),
        classes=classes_of(rank, float_rank, labels[images], _class_names(folder, classes)),
    )


def _class_names(folder: Images, classes: int) -> list[str]:
    """Return the name of each class, that of its sub-folder for example, or its number."""
    return [str(number) for number in range(classes)] if _numbered(folder) else list(folder.classes)


def _numbered(folder: Images) -> bool:
    """Return whether classes are known by their numbers alone."""
    return not folder.classes or bool(class_numbers(folder.classes))


def _batches(items: Iterator[tuple[int, Tensor]], size: int) -> Iterator[tuple[list[int], Array]]:
    while batch := list(itertools.islice(items, size)):
        numbers, tensors = zip(*batch, strict=True)
        yield list(numbers), np.stack([tensor.numpy() for tensor in tensors])


def _preprocessing(
    session: onnxruntime.InferenceSession, file: Path, model: str | None, options: ImageOptions = AS_RECORDED
) -> dict[str, Any]:
    """Return timm's data config, at the input size of the file."""
    if model is not None:
        check_name(model, "eval --model")
        config = data_config(timm.create_model(model, pretrained=False))
    else:
        properties = session.get_modelmeta().custom_metadata_map
        known = recorded(properties, str(file))
        if known is None and options.mean is not None and options.std is not None:
            known = {"mean": options.mean, "std": options.std, "interpolation": "bicubic"}
        if known is None:
            raise failure(
                "eval",
                str(file),
                expected="a file that records its preprocessing, as `ptq4vit quantize` writes it",
                got="no such record",
                do="pass --model with the timm model that it was made from, or --mean and --std",
            )
        config = known
    pixels = pixels_of(session, str(file), "eval")
    if pixels is not None:  # a file that scales its images itself does so by its own numbers
        if options.mean is not None or options.std is not None:
            do = "leave --mean and --std out"
            raise failure("eval", str(file), expected="a file of float images", got="one that scales itself", do=do)
        config = config | {"mean": pixels.mean, "std": pixels.std}
    size: Any = tuple(image_shape(session, pixels)[1:])
    return options.applied(at_size(config, size))


def _check_classes(folder: Images, classes: int, data: Path) -> None:
    _check_names(folder, classes, data)
    numbered, highest = _numbered(folder), max(folder.labels)
    if highest < classes and (len(folder.classes) == classes or numbered):
        return
    if not os.path.isdir(data) or not folder.classes:
        got = f"{len(folder.classes)}" if folder.classes else f"numbers up to {highest}"
        do = "pass the images that the model was trained for"
        raise failure("eval", str(data), expected=f"the {classes} classes of the model", got=got, do=do)
    raise failure(
        "eval",
        str(data),
        expected=f"{classes} sub-folders, one per class of the model",
        got=f"{len(folder.classes)}" + (f", numbered up to {highest}" if numbered else ""),
        do="name the sub-folders by class number (0, 1, ...) if some classes have no images",
    )


def _check_names(folder: Images, classes: int, data: Path) -> None:
    """Raise PTQError if one name among numbers makes the order of the names another one than that of the numbers.

    Warn if all are numbers, and their order as text, which is that of torchvision's ImageFolder, is another one.
    """
    names = folder.classes
    numbers = {name: number for name in names if (number := class_number(name)) is not None}
    others = [name for name in names if name not in numbers]
    moved = [name for place, name in enumerate(names) if numbers.get(name, place) != place]
    if not others and moved and len(names) == classes:
        warn(
            f"eval: {data}: sub-folders are classes by their number; torchvision's ImageFolder sorts them as text, "
            f"{names[2]} before {names[-1]}: if the model was trained that way, give the names leading zeros"
        )
    if len(numbers) > len(others) > 0 and moved and all(number < classes for number in numbers.values()):
        raise failure(
            "eval",
            str(data),
            expected="sub-folders that are all named by class number, or none",
            got=f"{some_names(others)} beside {some_names(numbers)}",
            do="move what is no class out of the folder",
        )


def _warn_of_empty(folder: Images, data: Path) -> None:
    filled = set(folder.labels)
    numbers = class_numbers(folder.classes)
    empty = [name for place, name in enumerate(folder.classes) if numbers.get(name, place) not in filled]
    if empty:
        warn(
            f"eval: {data}: {len(empty)} of {len(folder.classes)} sub-folders hold no image, and count as classes: "
            f"{some_names(empty)}"
        )


def _image_channels(session: onnxruntime.InferenceSession, file: Path) -> int:
    """Return the channels of the only input, an image batch; raises PTQError if it is something else.

    Also on images that are too large for the memory.
    """
    shapes = [entry.shape for entry in session.get_inputs()]
    if len(shapes) == 1:
        shapes = [image_shape(session, pixels_of(session, str(file), "eval"))]
    sides = [side for shape in shapes for side in shape[2:] if isinstance(side, int) and side > 0]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in MODES or len(sides) != 2:
        expected = "a file of one input, images (batch, 1 or 3 channels, height, width)"
        do = "measure other models in Python"
        raise failure("eval", str(file), expected=expected, got=" and ".join(map(str, shapes)), do=do)
    fixed_batch("eval", str(file), session)
    size = COPIES * FLOAT_BYTES * math.prod(shapes[0][1:])
    check_memory("eval", str(file), size, what=f"an image of {sides[0]} x {sides[1]} pixels", do="pass another file")
    return int(shapes[0][1])
