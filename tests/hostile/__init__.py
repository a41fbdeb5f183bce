"""ONNX files that nobody should have written, by kind: each case makes one in an empty folder out of a good model.

Cut and random bytes, places that are no files, metadata, changed graphs, graphs of other programs, weights elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

#: Makes a file out of a good model in an empty folder, and returns its path.
Case = Callable[[onnx.ModelProto, Path], Path]
#: What a terminal obeys, in a name.
EVIL = "\x1b[31mred\x07\x9b\u202e\n\u2028"


def written(content: bytes) -> Case:
    """Return the case of these bytes."""
    return made(lambda _: content)


def made(make: Callable[[onnx.ModelProto], bytes]) -> Case:
    """Return the case of the bytes that are made of a good model."""

    def write(model: onnx.ModelProto, folder: Path) -> Path:
        path = folder / "model.onnx"
        path.write_bytes(make(model))
        return path

    return write


def changed(change: Callable[[onnx.ModelProto], Any]) -> Case:
    """Return the case of a good model that was changed in place."""

    def make(model: onnx.ModelProto) -> bytes:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        change(copy)
        return copy.SerializeToString()

    return made(make)
