"""Image files as they are: orientation, 16 bits, floats, one channel or three; folders with links and hidden files."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageFile, ImageOps

from ptq4vit_fx.errors import failure
from ptq4vit_fx.files import not_a_file

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"])

#: What Pillow may take a file for, whatever its name: of its other formats one starts a program (EPS).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

#: Folders that programs leave behind, like all whose name starts with a dot.
HIDDEN = frozenset(["__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information"])

#: Pillow's mode for so many channels of a model.
MODES = {1: "L", 3: "RGB"}

#: Bytes that a pixel takes on its way to 8 bits in every channel, from 8 bits and from more.
BYTES_PER_PIXEL, BYTES_PER_WIDE_PIXEL = 12, 24

#: The longer side over the shorter one. Scaled until the shorter one is that of a model, a thread becomes a wall.
LONGEST_RATIO = 500

#: Which folder it is, whatever links lead to it: its device and its number there.
Identity = tuple[int, int]


def opened(path: Path, channels: int) -> Image.Image:
    """Return an image upright, as its EXIF orientation says, with 8 bits in 1 or 3 channels.

    Of several frames it is the first. Raises whatever Pillow raises on a file that it cannot read, and ValueError on
    what is no file, on values without a known range, and on a size that the file or the memory cannot hold.
    """
    other = not_a_file(path)
    if other:
        raise ValueError(other)
    with Image.open(path, formats=_formats()) as image:
        _check_size(image, os.path.getsize(path))
        upright = ImageOps.exif_transpose(image)
        return in_eight_bits(upright).convert(MODES[channels])


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


def in_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of more bits in 8, which Pillow's `convert` would clip at 255; other modes as they are.

    16 bits keep the upper 8, as Pillow does it for 16-bit RGB. Integers of 32 bits count as 16 or 8 bits by their
    largest value, floats as 0 to 1 or 0 to 255. Raises ValueError on other ranges.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= (255 if image.mode == "F" else 65535)):
        raise ValueError(f"values from {low:g} to {high:g} in mode {image.mode}: what is black and white is not known")
    if image.mode == "F":
        values = np.round(values * 255) if high <= 1 else np.round(values)
    elif image.mode != "I" or high > 255:
        values = values // 256
    return Image.fromarray(values.astype(np.uint8))


def visible(name: str) -> bool:
    """Return whether a name in a folder is the user's: neither hidden nor left behind by a program."""
    return not name.startswith(".") and name not in HIDDEN


@dataclass(frozen=True)
class Contents:
    """What is in a folder, at any depth: images in the order of their paths, and other files.

    folders: names of the folders in it. Of what is hidden, or was left behind by a program, there is nothing here.
    """

    images: tuple[Path, ...]
    folders: tuple[str, ...]
    others: tuple[Path, ...]


def contents(folder: Path, *, per_subfolder: bool = False) -> Contents:
    """List a folder once; links are followed, cycles are not.

    A folder that is there twice, through a link, is read once, or, per_subfolder, once in every sub-folder. What has
    the name of an image and is none, or is no file, is listed: `opened` says what it is. Raises PTQError on a folder
    that cannot be read.
    """
    identity, top, files = _listed(folder)
    seen = {identity}
    for inner in top:
        files += _walk(inner, {identity} if per_subfolder else seen)
    files.sort(key=lambda path: path.split(os.sep))
    images: list[Path] = []
    others: list[Path] = []
    for path in files:
        (images if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES else others).append(Path(path))
    return Contents(tuple(images), tuple(os.path.basename(path) for path in top), tuple(others))


def _walk(folder: str, seen: set[Identity]) -> Iterator[str]:
    """Yield the files in a folder, at any depth, but not those of a folder that was seen."""
    waiting = [folder]
    while waiting:
        identity, folders, files = _listed(Path(waiting.pop()), seen)
        seen.add(identity)
        waiting += reversed(folders)
        yield from files


def _listed(folder: Path, seen: Collection[Identity] = ()) -> tuple[Identity, list[str], list[str]]:
    """Return which folder it is, and the paths of the folders and of what else is visible in it, ordered by name.

    Of one that was seen nothing is listed.
    """
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            return identity, [], []
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if visible(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        do = "give yourself the right to read it, or leave it out"
        raise failure("read images", str(folder), expected="a readable folder", got=str(error), do=do) from error
    folders = [entry.path for entry in entries if _is_folder(entry)]
    inner = set(folders)
    return identity, folders, [entry.path for entry in entries if entry.path not in inner]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where one may not look
        return False
