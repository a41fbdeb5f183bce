"""Arrays of NumPy, `.npy` and `.npz`: headers are read at once, images when they are asked for, objects never."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ptq4vit_fx.data.pictures import Array, Images, Numbered
from ptq4vit_fx.errors import failure, foreign, some_names, unknown_name
from ptq4vit_fx.inputs.sizes import check_memory

#: Channels of pictures: gray, color, color and transparency.
CHANNELS = (1, 3, 4)
#: Kinds of pixels: decoded ones of 8 or 16 bits, and preprocessed ones.
WHOLE = (np.dtype(np.uint8), np.dtype(np.uint16))
#: Bytes that deflate makes of one at most.
DEFLATED = 1032
READS = "uint8 images (images, height, width, channels) or preprocessed floats (images, channels, height, width)"


@dataclass(frozen=True)
class Header:
    """What an array file says of itself; opened: gives a stream of it; start: where its values begin there."""

    opened: Callable[[], IO[bytes] | io.FileIO]
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def row(self, number: int) -> Array:
        """Return one entry along the first axis; raises ValueError if the file ends before."""
        count = math.prod(self.shape[1:])
        size = count * self.dtype.itemsize
        with self.opened() as stream:
            stream.seek(self.start + number * size)
            content = stream.read(size)
        if len(content) != size:
            raise ValueError("the file ends before it")
        values = np.frombuffer(content, self.dtype).reshape(self.shape[1:])
        return values.astype(self.dtype.newbyteorder("="))

    @property
    def are_images(self) -> bool:
        """Whether these may be images: (images, height, width), of three channels or one, first or last."""
        known = self.dtype in WHOLE or self.dtype.kind == "f"
        sides = len(self.shape) == 3 or (len(self.shape) == 4 and {self.shape[1], self.shape[3]} & {*CHANNELS})
        return known and bool(sides) and min(self.shape) > 0


def open_array(path: Path, *, entry: str | None, labelled: bool) -> Images:
    """Return the images of a `.npy` file. Raises PTQError on what is no array of images."""
    header = _header(partial(io.FileIO, path), str(path), os.path.getsize(path))
    if not header.are_images:
        raise _no_images(path, {"it": header})
    return _images(path, header, ())


def open_arrays(path: Path, *, entry: str | None, labelled: bool) -> Images:
    """Return the images of a `.npz` file: of the array `entry`, or of the only one; labels beside them, as integers.

    Raises PTQError on a damaged file, and where it does not say which arrays are meant.
    """
    do = "write it with numpy.savez"
    with foreign("read images", str(path), expected="a .npz file of NumPy", do=do):
        archive = zipfile.ZipFile(path)
        names = [name for name in archive.namelist() if name.endswith(".npy")]
    most = DEFLATED * os.path.getsize(path)
    headers = {n.removesuffix(".npy"): _header(partial(archive.open, n), f"{path}: {n}", most) for n in names}
    name = _image_array(path, headers, entry)
    labels = _labels(path, headers, name) if labelled else ()
    return _images(path, headers[name], labels)


def _header(opened: Callable[[], IO[bytes] | io.FileIO], subject: str, most: int) -> Header:
    """Read what a file says of its array; most: bytes that it may have.

    Raises PTQError on what is none, on one that is cut, and on objects, which are a program.
    """
    do = "write it with numpy.save"
    with foreign("read images", subject, expected="an array of NumPy", do=do), opened() as stream:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read[np.lib.format.read_magic(stream)](stream)
        header = Header(opened, stream.tell(), shape, dtype)
    if dtype.hasobject:
        got, do = "pickled objects, which may hold a program", "save an array of numbers"
        raise failure("read images", subject, expected="an array of numbers", got=got, do=do)
    if fortran and len(shape) > 1:
        do = "save numpy.ascontiguousarray of it"
        raise failure("read images", subject, expected="an array in C order", got="Fortran order", do=do)
    if math.prod(shape) * dtype.itemsize > most - header.start:
        got, do = f"the first of {shape}", "download or write it again"
        raise failure("read images", subject, expected="a whole array", got=got, do=do)
    return header


def _image_array(path: Path, headers: dict[str, Header], entry: str | None) -> str:
    """Return the name of the array of images."""
    if entry is not None and entry not in headers:
        raise unknown_name("read images", str(path), entry, headers)
    found = [name for name, header in headers.items() if header.are_images and entry in (None, name)]
    several = [name for name in found if len(headers[name].shape) == 4] or found
    if not several:
        raise _no_images(path, {entry: headers[entry]} if entry else headers)
    if len(several) > 1:
        do = f"name it: {path}:{several[0]}"
        raise failure("read images", str(path), expected="one array of images", got=some_names(several), do=do)
    return several[0]


def _labels(path: Path, headers: dict[str, Header], images: str) -> tuple[int, ...]:
    """Return the class numbers: the only integers that are as many as the images; () if there are none."""
    count = headers[images].shape[0]
    found = [
        n for n, h in headers.items() if h.dtype.kind in "iu" and h.shape in ((count,), (count, 1)) and n != images
    ]
    if len(found) > 1:
        got, do = some_names(found), "leave the others out"
        raise failure("read images", str(path), expected="one array of class numbers", got=got, do=do)
    if not found:
        return ()
    header = headers[found[0]]
    size = count * header.dtype.itemsize
    check_memory("read images", str(path), size, what=found[0], do="check the file")
    subject, do = f"{path}: {found[0]}", "write it again"
    with foreign("read images", subject, expected="class numbers", do=do), header.opened() as stream:
        stream.seek(header.start)
        return tuple(np.frombuffer(stream.read(size), header.dtype, count).tolist())


def _images(path: Path, header: Header, labels: Sequence[int]) -> Images:
    """Return the pictures of an array of images, without reading them."""
    count, *shape = header.shape
    last = len(shape) == 3 and shape[2] in CHANNELS
    is_float = header.dtype.kind == "f"
    if is_float and len(shape) == 2:
        raise _no_images(path, {"it": header})
    last = last and not (is_float and shape[0] in CHANNELS)
    size = 4 * math.prod(shape)
    check_memory("read images", str(path), size, what=f"an image of {shape}", do="check the file")

    def read(number: int) -> Array:
        values = header.row(number)
        if is_float:
            values = values.transpose(2, 0, 1) if last else values
            return np.ascontiguousarray(values, np.float32)
        return values if last or len(shape) == 2 else values.transpose(1, 2, 0)

    items = Numbered(count, lambda number: f"{path}: image {number}", read)
    float_shape = (shape[2], *shape[:2]) if last else tuple(shape)
    return Images(items, tuple(labels), float_shape=float_shape if is_float else None)


def _no_images(path: Path, headers: dict[str, Header]) -> Exception:
    what = [f"{name}: {header.dtype} of {header.shape}" for name, header in headers.items()]
    got = some_names(what, separator="; ").removeprefix("it: ") if what else "no array"
    return failure("read images", str(path), expected=READS, got=got, do="save the images so")
