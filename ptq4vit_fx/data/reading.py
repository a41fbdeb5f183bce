"""Pictures as the pixels that a model takes; what cannot be read is skipped by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ptq4vit_fx.data.image_files import opened
from ptq4vit_fx.data.pictures import Picture, content_of
from ptq4vit_fx.errors import LONGEST_REASON, failure, printable, some_names

Transform = Callable[[Image.Image], Tensor]


def read_images(
    pictures: Iterable[Picture], transform: Transform, skipped: list[str], channels: int = 3
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the picture, its pixels); what cannot be read goes to `skipped`, `name: reason`, instead.

    Floats are pixels already, and stay as they are.
    """
    for number, picture in enumerate(pictures):
        try:
            content = content_of(picture)
            floats = isinstance(content, np.ndarray) and content.dtype.kind == "f"
            pixels = torch.from_numpy(content) if floats else transform(opened(content, channels))
        except Exception as error:  # noqa: BLE001 - a broken file raises anything: SyntaxError, struct.error, a bomb's own
            reason = str(error).strip().splitlines() or [type(error).__name__]
            skipped.append(printable(f"{picture}: {reason[0][:LONGEST_REASON]}"))
            continue
        yield number, pixels


def said_of_skipped(skipped: Sequence[str]) -> str:
    """Return one line for pictures that were skipped: how many, and the first few with their reasons."""
    return f"skipped {len(skipped)} file{'s' * (len(skipped) > 1)}: {some_names(skipped, separator='; ')}"


def load_named(
    pictures: Sequence[Picture],
    transform: Transform,
    skipped: list[str],
    channels: int = 3,
) -> tuple[list[Picture], Tensor]:
    """Return the readable pictures and their pixels, (images, channels, height, width), held once.

    Raises PTQError if none is readable.
    """
    read: list[Picture] = []
    pixels: Tensor | None = None
    for number, image in read_images(pictures, transform, skipped, channels):
        if pixels is None:
            pixels = image.new_empty((len(pictures), *image.shape))
        pixels[len(read)] = image
        read.append(pictures[number])
    if pixels is None:
        where = getattr(pictures[0], "parent", pictures[0]) if pictures else "data"
        got = f"none of {len(skipped)}, the first: {skipped[0]}" if skipped else "none"
        raise failure("read images", str(where), expected="one readable image or more", got=got, do="check the files")
    return read, pixels[: len(read)]
