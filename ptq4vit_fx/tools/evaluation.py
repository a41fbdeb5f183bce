"""Top-1 accuracy of an ONNX file on a folder of labelled images."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import timm.data
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.metadata import PROVENANCE_KEY
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.tools.models import ImageFolder, data_config, list_images, read_images
from ptq4vit_fx.torch_state import independent_of_caller


@dataclass(frozen=True)
class Evaluation:
    """How many images were classified right; `skipped` lists unreadable files with the reason."""

    correct: int
    images: int
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"skipped {name}" for name in self.skipped]
        score = f"top-1 {self.correct / self.images:.2%}" if self.images else "no readable image"
        return "\n".join([*lines, f"{score} of {self.images} images, {len(self.skipped)} skipped"])


@independent_of_caller()
def evaluate_file(file: Path, data: Path, model: str | None, batch_size: int, console: Console) -> Evaluation:
    """Classify every image of `data`, one sub-folder per class, with the preprocessing that the file records.

    model: a timm model whose preprocessing to use instead. Raises PTQError if neither is known, or if the number of
    sub-folders is not the number of classes (unless the sub-folders are named by class number).
    """
    session = open_session(file)
    folder = list_images(data, labelled=True)
    transform = timm.data.create_transform(**_preprocessing(session, file, model))
    labels, skipped = np.asarray(folder.labels), list[str]()
    correct = images = 0
    bar = track(folder.paths, "eval", console=console)
    fixed = session.get_inputs()[0].shape[0]
    size = fixed if isinstance(fixed, int) else batch_size
    for numbers, pixels in _batches(read_images(bar, transform, skipped), size):
        # A file of a fixed batch takes no other: repeat the last image, drop its results.
        missing = fixed - len(pixels) if isinstance(fixed, int) else 0
        full = np.concatenate([pixels, pixels[-1:].repeat(missing, 0)])
        logits = session.run(None, {session.get_inputs()[0].name: full})[0][: len(numbers)]
        _check_classes(folder, logits.shape[1], data)
        correct += int((logits.argmax(1) == labels[numbers]).sum())
        images += len(numbers)
    return Evaluation(correct, images, tuple(skipped))


def _batches(items: Iterator[tuple[int, Tensor]], size: int) -> Iterator[tuple[list[int], np.ndarray[Any, Any]]]:
    while batch := list(itertools.islice(items, size)):
        numbers, tensors = zip(*batch, strict=True)
        yield list(numbers), np.stack([tensor.numpy() for tensor in tensors])


def _preprocessing(session: onnxruntime.InferenceSession, file: Path, model: str | None) -> dict[str, Any]:
    """Return timm's data config, at the input size of the file."""
    if model is not None:
        config = data_config(timm.create_model(model, pretrained=False))
    else:
        properties = session.get_modelmeta().custom_metadata_map
        config = json.loads(properties.get(PROVENANCE_KEY, "{}")).get("preprocessing")
        if config is None:
            raise failure(
                "eval",
                str(file),
                expected="a file that records its preprocessing, as `ptq4vit quantize` writes it",
                got="no such record",
                do="pass --model with the timm model that it was made from",
            )
    return config | {"input_size": tuple(session.get_inputs()[0].shape[1:])}


def _check_classes(folder: ImageFolder, classes: int, data: Path) -> None:
    numbered = all(name.isdigit() for name in folder.classes)
    if max(folder.labels) >= classes or (len(folder.classes) != classes and not numbered):
        raise failure(
            "eval",
            str(data),
            expected=f"{classes} sub-folders, one per class of the model",
            got=f"{len(folder.classes)}" + (f", numbered up to {max(folder.labels)}" if numbered else ""),
            do="name the sub-folders by class number (0, 1, ...) if some classes have no images",
        )
