"""Paths that are no files or no ONNX files, and bytes that are no model."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import save_file

from hostile import EVIL, Case, made, written


def pipe(folder: Path, name: str = "model.onnx") -> Path:
    """Make a pipe that nobody writes to."""
    os.mkfifo(folder / name)
    return folder / name


def sparse(folder: Path, name: str, size: int) -> Path:
    """Make a file that says that it is large, and takes no room."""
    with (folder / name).open("wb") as file:
        file.truncate(size)
    return folder / name


def listening(folder: Path) -> Path:
    """Make a socket."""
    here = Path.cwd()
    os.chdir(folder)  # the path of a socket has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("model.onnx")
    finally:
        os.chdir(here)
    return folder / "model.onnx"


def circle(folder: Path) -> Path:
    """Make a link to itself."""
    (folder / "model.onnx").symlink_to(folder / "model.onnx")
    return folder / "model.onnx"


def weights(folder: Path) -> Path:
    """Make a file of safetensors."""
    save_file({"w": np.ones((3, 5), np.float32)}, folder / "model.onnx")
    return folder / "model.onnx"


def at(make: Callable[[Path], Path]) -> Case:
    """Return the case of a path in a folder."""
    return lambda _, folder: make(folder)


def cut(eighth: int) -> Case:
    """Return the case of so many eighths of a good file."""

    def make(model: onnx.ModelProto) -> bytes:
        content = model.SerializeToString()
        return content[: len(content) * eighth // 8]

    return made(make)


PLACES: dict[str, Case] = {
    "missing": at(lambda folder: folder / "none.onnx"),
    "a folder": at(lambda folder: folder),
    "a pipe": at(pipe),
    "a socket": at(listening),
    "a device": at(lambda _: Path("/dev/zero")),
    "a link in a circle": at(circle),
    "a null byte in its name": at(lambda folder: folder / "a\0b.onnx"),
    "a name of 5,000 bytes": at(lambda folder: folder / ("a" * 5000)),
    "a name that a terminal obeys": at(lambda folder: folder / f"{EVIL}.onnx"),
    "a name that is no UTF-8": at(lambda folder: folder / os.fsdecode(b"\xff\xfe.onnx")),
    "safetensors": at(weights),
    "20 GB of nothing": at(lambda folder: sparse(folder, "model.onnx", 20 * 2**30)),
    "no bytes": written(b""),
    "a zip archive": written(b"PK\3\4" + bytes(60)),
    "text": written(b"ONNX\n" * 50),
    "a length of 2^63": written(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
    "graphs within each other": written(b"\x3a\x0a" * 500_000),
    **{f"{eighth} eighths": cut(eighth) for eighth in range(1, 8)},
    **{f"random bytes {n}": written(np.random.default_rng(n).bytes(200 * n)) for n in range(1, 5)},
}
