"""Pictures by name, wherever they are kept; nothing is read before it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from ptq4vit_fx.errors import failure

Array = NDArray[Any]
#: An image file, its bytes, an image of pillow, decoded pixels (height, width[, channels]) of uint8 or uint16, or
#: preprocessed ones (channels, height, width), float.
Content = Path | bytes | Image.Image | Array

#: No picture is larger than so many bytes; what says that it is, is none.
LARGEST = 2**30


@dataclass(frozen=True)
class Stored:
    """A picture inside of something else: its name, and what reads it, raising whatever is wrong with it."""

    name: str
    read: Callable[[], Content]

    def __str__(self) -> str:
        return self.name


Picture = Path | Stored


@dataclass(frozen=True)
class Numbered(Sequence[Stored]):
    """So many pictures that are known by their numbers: name gives what each is called, read what there is of it."""

    length: int
    name: Callable[[int], str]
    read: Callable[[int], Content]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self.length:
            raise IndexError(number)
        return Stored(self.name(number), partial(self.read, number))


@dataclass(frozen=True)
class Images:
    """Pictures in their order, and, where they are labelled, the class number of each.

    classes: the names of the classes, empty where only numbers are known. float_shape: (channels, height, width) of
    pictures that are preprocessed already, None of those that are not.
    """

    items: Sequence[Picture]
    labels: Sequence[int] = ()
    classes: tuple[str, ...] = ()
    float_shape: tuple[int, ...] | None = None


def content_of(picture: Picture) -> Content:
    """Return what there is of a picture; raises whatever is wrong with it."""
    return picture.read() if isinstance(picture, Stored) else picture


def short_name(picture: Picture, data: Path) -> str:
    """Return how a report calls a picture: by its path inside of `data`, or by its place there."""
    if isinstance(picture, Stored):
        return picture.name.removeprefix(f"{data}: ")
    return os.path.relpath(picture, data if os.path.isdir(data) else data.parent)


def evenly_spread(count: int, limit: int) -> list[int]:
    """Return so many of `count` numbers, at equal distances; all of them if they are fewer."""
    return list(range(count)) if count <= limit else [i * count // limit for i in range(limit)]


def check_float_shape(images: Images, size: tuple[int, ...], data: Path) -> None:
    """Raise PTQError if pictures are preprocessed to another size than (channels, height, width)."""
    if images.float_shape in (None, size):
        return
    expected = f"float images of the model's size {size}, or uint8 ones of any size"
    do = "preprocess them for this model, save uint8 images, or add --img-size where the model can be built so"
    raise failure("read images", str(data), expected=expected, got=str(images.float_shape), do=do)
