"""Accuracy of an ONNX file on labelled images, by itself and beside the float model."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor

from ptq4vit_fx.data.classes import class_number, class_numbers
from ptq4vit_fx.data.image_files import MODES
from ptq4vit_fx.data.pictures import Images, check_float_shape
from ptq4vit_fx.data.preprocessing import at_size, transform_of
from ptq4vit_fx.data.reading import read_images
from ptq4vit_fx.data.sources import open_images
from ptq4vit_fx.errors import failure, some_names, unknown_name, warn
from ptq4vit_fx.export.metadata import provenance
from ptq4vit_fx.export.pixels import image_shape, pixels_of
from ptq4vit_fx.export.preprocessing import recorded
from ptq4vit_fx.export.proof.against_float import KINDS
from ptq4vit_fx.export.proof.outputs import fixed_batch
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.inputs.sizes import COPIES, FLOAT_BYTES, check_memory
from ptq4vit_fx.tools.classifiers import Array, Runs, embedding_in, file_outputs, logits_of
from ptq4vit_fx.tools.image_options import ImageOptions
from ptq4vit_fx.tools.named.kinds import load_model
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tools.neighbours import vectors_of
from ptq4vit_fx.tools.phases import CLASSIFY, Phases, calls
from ptq4vit_fx.tools.scores import Evaluation, classified, ranks, retrieved
from ptq4vit_fx.torch_state import independent_of_caller

#: Pictures become pixels as the file says.
AS_RECORDED = ImageOptions()
#: What to do of a file without that record.
ADVICE = {
    "eval": "pass --model with the timm model that it was made from, or --mean and --std",
    "report": "pass images in Python: ptq.report(file, data=images)",
    "verify": "pass --model with the timm model that it was made from, or call verify_onnx in Python",
}


@independent_of_caller()
def evaluate_file(
    file: Path,
    data: Path,
    model: str | None,
    batch_size: int,
    phases: Phases,
    reference: Runs | None = None,
    kind: str | None = None,
    options: ImageOptions = AS_RECORDED,
) -> Evaluation:
    """Classify every image of `data`, which are labelled, with the preprocessing that the file records.

    model: whose preprocessing to use instead, by a name as for `quantize`. phases: shows how many images are done.
    reference: the float model, which sees the same images. kind: what the output is, None for what the file says; of
    embeddings each image is looked for among the others. options: what of the preprocessing is to be another. Raises
    PTQError if no preprocessing is known, if the file takes something else than images, or if the number of sub-folders
    is not the number of classes (unless the sub-folders are named by class number). Warns (PTQWarning) of sub-folders
    without images.
    """
    session = open_session(file)
    channels = image_channels(session, file, "eval")
    runs = file_outputs(session, file)
    embedding = embedding_in(_shapes(session), _kind(session, file, kind))
    folder = open_images(data, labelled=True)
    config = preprocessing_of_file(session, file, model, options=options)
    check_float_shape(folder, tuple(config["input_size"]), data)
    transform = calls(transform_of(config), phases.show, CLASSIFY, len(folder.items))
    _warn_of_empty(folder, data)
    labels, skipped, classes = np.asarray(folder.labels), list[str](), 0
    seen = list[tuple[list[int], Array, Array | None]]()  # the numbers of the images, and what both give
    size = fixed_batch("eval", str(file), session) or batch_size
    with phases(CLASSIFY):
        for numbers, pixels in _batches(read_images(folder.items, transform, skipped, channels), size):
            own, beside = runs(pixels), None if reference is None else reference(pixels)
            if embedding is not None:
                seen.append((numbers, *_vectors(embedding, own, beside)))
                continue
            logits = logits_of(own, str(file))
            _check_classes(folder, logits.shape[1], data)
            others = None if beside is None else logits_of(beside, "--against")
            if others is not None and others.shape != logits.shape:
                expected, do = f"logits of the shape {logits.shape}, as the file's", "pass the model of the file"
                raise failure("eval", "--against", expected=expected, got=str(others.shape), do=do)
            found = [_in_short(side, labels[numbers]) for side in (logits, others) if side is not None]
            seen.append((numbers, found[0], found[1] if others is not None else None))
            classes = logits.shape[1]
    if not seen:
        return Evaluation(0, tuple(skipped))
    images = np.concatenate([one[0] for one in seen])
    mine, theirs = _joined([one[1] for one in seen]), _joined([one[2] for one in seen])
    if embedding is not None:
        return retrieved(mine, theirs, labels[images], list(folder.classes), tuple(skipped))
    return classified(mine, theirs, labels[images], _class_names(folder, classes), tuple(skipped), classes)


def _kind(session: onnxruntime.InferenceSession, file: Path, kind: str | None) -> str | None:
    """Return what the output is, as the user says it, else as the file records it; raises PTQError on no kind."""
    if kind is not None and kind not in KINDS:
        raise unknown_name("eval", "--output-kind", kind, KINDS)
    said = provenance(session.get_modelmeta().custom_metadata_map, "eval", str(file)).get("output")
    return kind or (said if said in KINDS else None)


def _shapes(session: onnxruntime.InferenceSession) -> dict[str, Array]:
    """Return name -> an empty array of as many dimensions, of each output."""
    return {entry.name: np.empty([0] * len(entry.shape)) for entry in session.get_outputs()}


def _vectors(name: str, own: Mapping[str, Array], beside: Mapping[str, Array] | None) -> tuple[Array, Array | None]:
    """Return the embeddings of a file and of the model beside it; raises PTQError if they have other sizes."""
    mine = vectors_of(own[name])
    if beside is None:
        return mine, None
    other = embedding_in(beside, "embeddings") if name not in beside else name
    theirs = vectors_of(beside[other]) if other is not None else np.empty(0)
    if theirs.shape != mine.shape:
        expected, do = f"embeddings of the shape {mine.shape}", "pass the model that it was made from"
        raise failure("eval", "--against", expected=expected, got=str(theirs.shape), do=do)
    return mine, theirs


def _in_short(logits: Array, labels: Array) -> Array:
    """Return the rank of the right class and the first class of each image, (images, 2)."""
    return np.stack([ranks(logits, labels), logits.argmax(1)], axis=1)


def _joined(batches: Sequence[Array | None]) -> Any:
    arrays = [batch for batch in batches if batch is not None]
    return np.concatenate(arrays) if arrays else None


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


def preprocessing_of_file(
    session: onnxruntime.InferenceSession,
    file: Path,
    model: str | None,
    operation: str = "eval",
    options: ImageOptions = AS_RECORDED,
) -> dict[str, Any]:
    """Return timm's data config, at the input size of the file. Raises PTQError if neither file nor model says it.

    options: what of it is to be another.
    """
    if model is not None:
        config = load_model(Asked(model, pretrained=False)).preprocessing
    else:
        properties = session.get_modelmeta().custom_metadata_map
        known = recorded(properties, str(file))
        if known is None and options.mean is not None and options.std is not None:
            known = {"mean": options.mean, "std": options.std, "interpolation": "bicubic"}
        if known is None:
            raise failure(
                operation,
                str(file),
                expected="a file that records its preprocessing, as `ptq4vit quantize` writes it",
                got="no such record",
                do=ADVICE[operation],
            )
        config = known
    pixels = pixels_of(session, str(file), operation)
    if pixels is not None:  # a file that scales its images itself does so by its own numbers
        if options.mean is not None or options.std is not None:
            do = "leave --mean and --std out"
            raise failure(operation, str(file), expected="a file of float images", got="one that scales itself", do=do)
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


def image_channels(session: onnxruntime.InferenceSession, file: Path, operation: str) -> int:
    """Return the channels of the only input, an image batch; raises PTQError if it is something else.

    Also on images that are too large for the memory.
    """
    shapes = [entry.shape for entry in session.get_inputs()]
    if len(shapes) == 1:
        shapes = [image_shape(session, pixels_of(session, str(file), operation))]
    sides = [side for shape in shapes for side in shape[2:] if isinstance(side, int) and side > 0]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in MODES or len(sides) != 2:
        expected = "a file of one input, images (batch, 1 or 3 channels, height, width)"
        do = "measure other models in Python"
        raise failure(operation, str(file), expected=expected, got=" and ".join(map(str, shapes)), do=do)
    fixed_batch(operation, str(file), session)
    size = COPIES * FLOAT_BYTES * math.prod(shapes[0][1:])
    check_memory(operation, str(file), size, what=f"an image of {sides[0]} x {sides[1]} pixels", do="pass another file")
    return int(shapes[0][1])
