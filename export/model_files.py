"""ONNX files on disk: one file, or a model and `<name>.data` beside it where protobuf cannot hold the weights."""

from __future__ import annotations

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


def weight_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes of all initializers that lie in the model itself."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def is_too_large(model: onnx.ModelProto) -> bool:
    """Return whether this model cannot be one protobuf message."""
    return weight_bytes(model) > PROTOBUF_LIMIT


def write_model(model: onnx.ModelProto, path: str | os.PathLike[str], operation: str) -> int:
    """Check a model, write it whole or not at all, and return how many bytes it takes on disk.

    A model above PROTOBUF_LIMIT gets its weights in `<name>.data` beside it; `model` then loses them too. Raises
    PTQError if the folder is not writable, onnx.checker.ValidationError if the model is not valid ONNX.
    """
    if is_too_large(model):
        return _write_with_data(model, check_writable(path, operation))
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path, operation) as temporary:
        onnx.save(model, temporary)
    return os.path.getsize(path)


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


def data_path(path: str | os.PathLike[str]) -> Path:
    """Return where the weights of a large model lie: `<name>.data` beside the file."""
    return Path(path).with_name(f"{Path(path).name}.data")


def _write_with_data(model: onnx.ModelProto, path: Path) -> int:
    """Write both files into a temporary folder, check them there, move them; remove the first if the second fails."""
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        _move_weights(model, temporary)
        onnx.save(model, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)
        size = temporary.stat().st_size + data_path(temporary).stat().st_size
        os.replace(data_path(temporary), data_path(path))
        try:
            os.replace(temporary, path)
        except OSError:
            data_path(path).unlink()
            raise
    return size


def _move_weights(model: onnx.ModelProto, path: Path) -> None:
    """Write the large initializers to the data file of `path` and leave their place, offset and length in the model.

    Fields: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
    """
    with open(data_path(path), "wb") as file:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < INLINE_BYTES:
                continue
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            place = {"location": data_path(path).name, "offset": file.tell(), "length": len(tensor.raw_data)}
            file.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
