"""Image files as they are: orientation, 16 bits, floats, one channel or three; folders with links and hidden files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ptq4vit_fx.errors import failure

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"])

#: Folders that programs leave behind, like all whose name starts with a dot.
HIDDEN = frozenset(["__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information"])

#: Pillow's mode for so many channels of a model.
MODES = {1: "L", 3: "RGB"}


def opened(path: Path, channels: int) -> Image.Image:
    """Return an image upright, as its EXIF orientation says, with 8 bits in 1 or 3 channels.

    Of several frames it is the first. Raises whatever Pillow raises on a file that it cannot read, and ValueError on
    values without a known range.
    """
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        return in_eight_bits(upright).convert(MODES[channels])


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


def image_paths(folder: Path, *, per_subfolder: bool = False) -> list[Path]:
    """Return the images of a folder, nested or flat, in the order of their paths; links are followed, cycles are not.

    A folder that is there twice, through a link, is read once, or, per_subfolder, once in every sub-folder. Raises
    PTQError on a folder that cannot be read.
    """
    entries = _entries(folder)
    seen = {folder.resolve()}
    found = [path for path in entries if not path.is_dir() and _is_image(path)]
    for path in entries:
        if path.is_dir():
            found += _walk(path, {folder.resolve()} if per_subfolder else seen)
    return sorted(found)


def subfolders(folder: Path) -> list[str]:
    """Return the names of the visible sub-folders, links to folders too, in order."""
    return sorted(path.name for path in _entries(folder) if path.is_dir())


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for path in _entries(folder):
        if path.is_dir():
            yield from _walk(path, seen)
        elif _is_image(path):
            yield path


def _entries(folder: Path) -> list[Path]:
    try:
        return [Path(entry) for entry in sorted(os.scandir(folder), key=lambda e: e.name) if visible(entry.name)]
    except OSError as error:
        do = "give yourself the right to read it, or leave it out"
        raise failure("read images", str(folder), expected="a readable folder", got=str(error), do=do) from error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or path.is_symlink())  # broken links are said
