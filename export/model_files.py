"""ONNX files on disk: one file, or a model and a data file beside it where protobuf cannot hold the weights."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from pathlib import Path

import onnx
import onnxruntime
from onnx import TensorProto

from ptq4vit_fx.files import atomic_path, check_writable

#: Weights above this leave the protobuf file, whose limit is 2^31 bytes: https://protobuf.dev/programming-guides/proto-limits
#: (16 MiB stay for nodes and names).
PROTOBUF_LIMIT = 2**31 - 2**24
#: Smaller tensors stay in the model file: shapes and scales must be readable without the data.
INLINE_BYTES = 1024
#: Where a tensor starts in the data file: a page, so that runtimes can map it into memory.
ALIGNMENT = 4096
#: Hexadecimal digits of the weights' hash in the name of a data file.
HASH_DIGITS = 16


def weight_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes of all initializers that lie in the model itself."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def is_too_large(model: onnx.ModelProto) -> bool:
    """Return whether this model cannot be one protobuf message."""
    return weight_bytes(model) > PROTOBUF_LIMIT


def write_model(model: onnx.ModelProto, path: str | os.PathLike[str], operation: str) -> int:
    """Check a model, write it whole or not at all, and return how many bytes it takes on disk.

    A model above PROTOBUF_LIMIT gets its weights in a data file beside it; `model` then loses them too. The data files
    of a model that was at `path` before are removed at the end. Raises PTQError if the folder is not writable,
    onnx.checker.ValidationError if the model is not valid ONNX.
    """
    target = check_writable(path, operation)
    before = data_files(target)
    if is_too_large(model):
        size, data = _write_with_data(model, target)
        before.discard(data)
    else:
        onnx.checker.check_model(model, full_check=True)
        with atomic_path(target, operation) as temporary:
            onnx.save(model, temporary)
        size = target.stat().st_size
    for stale in before:
        stale.unlink()
    return size


def session_of(model: onnx.ModelProto, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Open a model that is in memory in ONNX Runtime's CPU provider.

    One that is too large for a message goes through a temporary file; `model` loses its weights then.
    """
    providers = ["CPUExecutionProvider"]
    if not is_too_large(model):
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _move_weights(model, path)
        onnx.save(model, path)
        return onnxruntime.InferenceSession(str(path), options, providers=providers)


def data_files(path: Path) -> set[Path]:
    """Return the data files that `write_model` left for this path: `<name>.<hash of the weights>.data`."""
    return set(path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * HASH_DIGITS}.data"))


def _write_with_data(model: onnx.ModelProto, path: Path) -> tuple[int, Path]:
    """Write both files into a temporary folder, check them there, move them; return their size and the data's path.

    The data file is named by its content and moved first: whatever is interrupted, the model at `path` finds the
    weights that it was written with.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        written = _move_weights(model, temporary)
        data = path.with_name(written.name)
        is_new = not data.exists()
        onnx.save(model, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)
        size = temporary.stat().st_size + written.stat().st_size
        os.replace(written, data)
        try:
            os.replace(temporary, path)
        except OSError:
            if is_new:
                data.unlink()
            raise
    return size, data


def _move_weights(model: onnx.ModelProto, path: Path) -> Path:
    """Move the large initializers to a data file beside `path`; return where it is.

    The model keeps their place, offset and length: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
    """
    tensors = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= INLINE_BYTES]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(len(tensor.raw_data).to_bytes(8, "little"))  # other tensors may have the same bytes in sum
        digest.update(tensor.raw_data)
    data = path.with_name(f"{path.name}.{digest.hexdigest()[:HASH_DIGITS]}.data")
    with open(data, "wb") as file:
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            place = {"location": data.name, "offset": file.tell(), "length": len(tensor.raw_data)}
            file.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
    return data
