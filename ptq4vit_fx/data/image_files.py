"""Image files as a person sees them: upright, 16 bits, floats, transparency on white, one channel or three."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageFile, ImageOps

from ptq4vit_fx.data.pictures import Array, Content
from ptq4vit_fx.files import not_a_file

#: Names of images. What Pillow cannot read of them (.heic, .heif and .jxl without a plugin) is skipped by name.
IMAGE_SUFFIXES = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"),
        *(".pbm", ".pnm", ".avif", ".jp2", ".heic", ".heif", ".jxl"),
    ]
)

#: What Pillow may take a file for, whatever its name: of its other formats one starts a program (EPS).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

#: Pillow's mode for so many channels of a model.
MODES = {1: "L", 3: "RGB"}

#: Bytes that a pixel takes on its way to 8 bits in every channel, from 8 bits and from more.
BYTES_PER_PIXEL, BYTES_PER_WIDE_PIXEL = 12, 24

#: The longer side over the shorter one. Scaled until the shorter one is that of a model, a thread becomes a wall.
LONGEST_RATIO = 500


#: Tags of a TIFF file: the bits of a sample, and what they mean, where 0 stands for "black is the largest value".
BITS, MEANING, WHITE_IS_ZERO = 258, 262, 0
#: Modes whose numbers are no colors that Pillow converts.
UNKNOWN_COLORS = ("LAB", "HSV")
NO_TAGS: Mapping[int, Any] = {}


def opened(content: Content, channels: int) -> Image.Image:
    """Return an image upright, as its EXIF orientation says, with 8 bits in 1 or 3 channels, on white.

    content: a file, its bytes, an image of pillow, or pixels (height, width[, channels]). Of several frames it is the
    first. Raises whatever Pillow raises on a file that it cannot read, and ValueError on what is no file, on values and
    colors whose meaning is not known, and on a size that the file or the memory cannot hold.
    """
    if isinstance(content, np.ndarray):
        return _on_white(_decoded(content)).convert(MODES[channels])
    if isinstance(content, Image.Image):
        return _upright(content, channels)
    other = not_a_file(content) if isinstance(content, Path) else ""
    if other:
        raise ValueError(other)
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    size = len(content) if isinstance(content, bytes) else os.path.getsize(content)
    with Image.open(stream, formats=_formats()) as image:
        _check_size(image, size)
        return _upright(image, channels)


def _upright(image: Image.Image, channels: int) -> Image.Image:
    tags, kind = dict(getattr(image, "tag_v2", {})), str(image.format)
    upright = in_eight_bits(ImageOps.exif_transpose(image), kind, tags)
    if upright.mode in UNKNOWN_COLORS:
        raise ValueError(f"colors of mode {upright.mode}: save it as RGB")
    return _on_white(upright).convert(MODES[channels])


def _decoded(pixels: Array) -> Image.Image:
    """Return pixels of 8 or 16 bits, (height, width) or with 1, 3 or 4 channels behind, as an image of 8."""
    pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _on_white(image: Image.Image) -> Image.Image:
    """Return what is seen of an image with transparency on white paper; others as they are.

    Pillow's `convert` would show the colors of what cannot be seen: black, or whatever a program left there.
    """
    key = image.info.get("transparency")
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and (key is None or _of_16_bits(key)):
        return image
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)


def _of_16_bits(key: object) -> bool:
    """Return whether this is a transparent color of more bits than Pillow has kept of the pixels."""
    return max((*key,) if isinstance(key, tuple) else (key if isinstance(key, int) else 0,), default=0) > 255


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(image: Image.Image, size: int) -> None:
    """Raise ValueError before pixels are read that are not in the file, or that memory does not hold."""
    width, height = image.size
    pixels = width * height
    need = pixels * (BYTES_PER_WIDE_PIXEL if image.mode.startswith(("I", "F")) else BYTES_PER_PIXEL)
    free = psutil.virtual_memory().available
    if max(width, height) > LONGEST_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is more than {LONGEST_RATIO} times the other")
    codecs = {tile[0] for tile in image.tile} if isinstance(image, ImageFile.ImageFile) else set()
    if codecs == {"raw"} and pixels > 8 * size:
        raise ValueError(f"{width} x {height} pixels, not compressed, in {size} bytes")
    if need > free:
        raise ValueError(f"{width} x {height} pixels take {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def in_eight_bits(image: Image.Image, kind: str = "TIFF", tags: Mapping[int, Any] = NO_TAGS) -> Image.Image:
    """Return an image of more bits in 8, which Pillow's `convert` would clip at 255; other modes as they are.

    16 bits keep the upper 8, as Pillow does it for 16-bit RGB, and the 12 of some TIFF files theirs. Integers of 32
    bits count as 16 or 8 bits by their largest value, floats as 0 to 1 or 0 to 255. kind: Pillow's name of the format,
    in most of which integers have 16 bits. tags: of a TIFF file. Raises ValueError on other ranges.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= (255 if image.mode == "F" else 65535)):
        raise ValueError(f"values from {low:g} to {high:g} in mode {image.mode}: what is black and white is not known")
    bits = tags.get(BITS, (16,))
    if image.mode == "F":
        values = np.round(values * 255) if high <= 1 else np.round(values)
    elif image.mode != "I" or high > 255 or kind != "TIFF":
        values = values >> (4 if bits == (12,) else 8)
    values = values.astype(np.uint8)
    return Image.fromarray(255 - values if tags.get(MEANING) == WHITE_IS_ZERO else values)
