"""Pictures that somebody hands in in Python, by path or as objects, as batches of the pixels that a model takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ptq4vit_fx.data.arrays import CHANNELS
from ptq4vit_fx.data.pictures import Content, Images, Numbered, evenly_spread
from ptq4vit_fx.data.preprocessing import transform_of
from ptq4vit_fx.data.reading import read_images, said_of_skipped
from ptq4vit_fx.data.sources import open_images
from ptq4vit_fx.errors import failure, foreign, warn

#: Pictures that are read where `images=` does not say it: so many are enough (docs/calibration.md).
PICTURES = 32
#: Pictures of a batch.
BATCH = 8
#: Entries of an item that hold its image, where it has several.
ENTRIES = ("pixel_values", "image", "img", "images")

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class Preparation:
    """How pictures become pixels: by `transform`, where it is given, else by timm's data config of the model.

    operation: whose data they are, for the PTQError of pictures that nobody says how to prepare.
    """

    operation: str
    transform: Transform | None = None
    config: Mapping[str, Any] | None = None

    def of_files(self) -> tuple[Transform, int]:
        """Return what makes pixels of an upright image, and the channels that it wants."""
        if self.transform is not None:
            return self.transform, 3
        if self.config is None:
            expected, got = "transform= beside pictures", "a model that does not say how it wants them"
            do = "pass a function from an image of pillow to its pixels (channels, height, width)"
            raise failure(self.operation, "data", expected=expected, got=got, do=do)
        return transform_of(dict(self.config)), self.config["input_size"][0]


def as_pixels(data: Any, preparation: Preparation, images: int | None = None) -> Any:
    """Return batches of pixels where data are pictures or there is a transform; anything else as it is.

    data: the path of what `open_images` reads; a sequence of images of pillow or their paths, or of items that start
    with one or have one by name, such as a data set of torchvision or Hugging Face; uint8 arrays of NumPy (images,
    height, width, channels) or with the channels first. Of these `images`, 32 by default, are read, evenly spread over
    all. The transform is given each of them as an upright image of pillow, and of other data what an item has for the
    image. Raises PTQError on data that cannot be read, and warns (PTQWarning) of pictures that were skipped.
    """
    count = images if isinstance(images, int) and images > 0 else PICTURES
    said = preparation.transform is not None or preparation.config is not None
    if isinstance(data, (str, os.PathLike)):
        return _batches(open_images(Path(data)), preparation, count)
    if isinstance(data, np.ndarray) and _are_decoded(data) and said:
        rows = data if data.shape[3] in CHANNELS else data.transpose(0, 2, 3, 1)
        return _batches(Images(Numbered(len(rows), "image {}".format, rows.__getitem__)), preparation, count)
    if _is_sequence(data) and _picture_in(data[0]) is not None:
        items = Numbered(len(data), "item {}".format, partial(_item, data))
        return _batches(Images(items), preparation, count)
    return data if preparation.transform is None else _transformed(data, preparation.transform, preparation.operation)


def _are_decoded(array: Any) -> bool:
    return array.dtype == np.uint8 and array.ndim == 4 and bool({array.shape[1], array.shape[3]} & {*CHANNELS})


def _is_sequence(data: Any) -> bool:
    plain = isinstance(data, (Tensor, np.ndarray, Mapping)) or not hasattr(data, "__getitem__")
    return not plain and hasattr(data, "__len__") and len(data) > 0


def _picture_in(item: Any) -> Any:
    """Return the image of pillow, or the path, that an item of data is, starts with, or has by name; else None."""
    if isinstance(item, (Image.Image, str, os.PathLike)):
        return item
    if isinstance(item, (tuple, list)):
        return item[0] if 1 <= len(item) <= 2 and isinstance(item[0], (Image.Image, str, os.PathLike)) else None
    if isinstance(item, Mapping):
        return next((value for value in item.values() if isinstance(value, Image.Image)), None)
    return None


def _item(data: Any, number: int) -> Content:
    """Return the picture of an item; raises ValueError if it has none."""
    picture = _picture_in(data[number])
    if picture is None:
        raise ValueError("no image in it")
    return picture if isinstance(picture, Image.Image) else Path(picture)


def _batches(images: Images, preparation: Preparation, count: int) -> list[Tensor]:
    """Return the pixels of some pictures, evenly spread over all, in batches; they are held once."""
    operation, skipped = preparation.operation, list[str]()
    transform, channels = (torch.as_tensor, 3) if images.float_shape else preparation.of_files()
    chosen = [images.items[number] for number in evenly_spread(len(images.items), count)]
    batches, batch, shapes = list[Tensor](), list[Tensor](), set[tuple[int, ...]]()
    for _, pixels in read_images(chosen, transform, skipped, channels):
        batch.append(torch.as_tensor(pixels))
        shapes.add(tuple(batch[-1].shape))
        if len(shapes) > 1:
            got, do = " and ".join(map(str, sorted(shapes))), "let the transform end with one size"
            raise failure(operation, "data", expected="pixels of one size", got=got, do=do)
        if len(batch) == BATCH:
            batches.append(torch.stack(batch))
            batch = []
    batches += [torch.stack(batch)] if batch else []
    if not batches:
        got, do = f"none of {len(skipped)}, the first: {skipped[0]}", "check the files, and the transform"
        raise failure(operation, "data", expected="one readable image or more", got=got, do=do)
    if skipped:
        warn(f"{operation}: data: {said_of_skipped(skipped)}")
    return batches


def _transformed(data: Any, transform: Transform, operation: str) -> Any:
    """Return data whose images went through a transform, as a list where they are in memory."""

    def batch(item: Any) -> Tensor:
        do = "pass one that takes what an item of data has for the image"
        with foreign(operation, "transform", expected="pixels of an item of data", do=do):
            pixels = torch.as_tensor(transform(_image_of(item)))
        return pixels[None] if pixels.ndim == 3 else pixels

    if isinstance(data, (Tensor, np.ndarray)):
        return [torch.cat([batch(row) for row in data])]
    return [batch(item) for item in data] if isinstance(data, (list, tuple)) else map(batch, iter(data))


def _image_of(item: Any) -> Any:
    """Return what an item of data has for the image: itself, the first of a tuple, an entry of a mapping."""
    if isinstance(item, Mapping):
        return item[next((name for name in ENTRIES if name in item), ENTRIES[0])]
    return item[0] if isinstance(item, (tuple, list)) else item
