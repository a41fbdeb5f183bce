"""ONNX files on disk: one file, or a model and a data file beside it where protobuf cannot hold the weights.

In memory a model is onnx_ir's: its tensors lie where they were made, or still in the file. Nothing here takes a tensor
away from a model that it was given.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

import onnx
import onnx_ir as ir

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.nodes import name_of
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


def load_file(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file; weights beside it are read when they are needed.

    Raises PTQError if it is no ONNX model, or if weights are missing.
    """
    try:
        model = ir.load(path)
        folder = Path(path).resolve().parent
        for tensor in tensors_of(model):
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if not Path(tensor.path).resolve().is_relative_to(folder):
                raise PermissionError(f"the weights {tensor.name} lie outside of the file's folder, at {tensor.path}")
            end = tensor.nbytes + (tensor.offset or 0)
            if os.path.getsize(tensor.path) < end:
                raise EOFError(f"{tensor.path} ends in front of byte {end}, where {tensor.name} does")
    except Exception as error:
        raise failure(
            "read ONNX file",
            str(path),
            expected="an ONNX model",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            do="check the path",
        ) from error
    return model


def tensors_of(model: ir.Model) -> list[ir.TensorProtocol]:
    """Return the tensors of all constants of a model."""
    return [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]


def is_too_large(model: ir.Model) -> bool:
    """Return whether this model cannot be one protobuf message."""
    return sum(tensor.nbytes for tensor in tensors_of(model)) > PROTOBUF_LIMIT


def message_of(model: ir.Model, beside: Collection[str] = ()) -> onnx.ModelProto:
    """Return a model as a protobuf message, with its weights. beside: names of those that stay in a file beside it."""
    message = ir.to_proto(model)
    for tensor in message.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name not in beside:
            source = model.graph.initializers[tensor.name].const_value
            assert source is not None
            tensor.CopyFrom(ir.to_proto(ir.Tensor(source.numpy(), source.dtype, name=tensor.name)))
    types = [value for value in message.graph.value_info if value.name not in model.graph.initializers]
    del message.graph.value_info[:]  # a constant says its own type
    message.graph.value_info.extend(types)
    return message


def write_model(model: ir.Model, path: str | os.PathLike[str], operation: str) -> int:
    """Check a model, write it whole or not at all, and return how many bytes it takes on disk.

    A model above PROTOBUF_LIMIT gets its weights in a data file beside it. The data files of a model that was at `path`
    before are removed at the end. Raises PTQError if the folder is not writable, onnx.checker.ValidationError if the
    model is not valid ONNX.
    """
    target = check_writable(path, operation)
    before = data_files(target)
    if is_too_large(model):
        size, data = _write_with_data(model, target)
        before.discard(data)
    else:
        message = message_of(model)
        onnx.checker.check_model(message, full_check=True)
        with atomic_path(target, operation) as temporary:
            onnx.save(message, temporary)
        size = target.stat().st_size
    for stale in before:
        stale.unlink()
    return size


def data_files(path: Path) -> set[Path]:
    """Return the data files that `write_model` left for this path: `<name>.<hash of the weights>.data`."""
    return set(path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * HASH_DIGITS}.data"))


def _write_with_data(model: ir.Model, path: Path) -> tuple[int, Path]:
    """Write both files into a temporary folder, check them there, move them; return their size and the data's path.

    The data file is named by its content and moved first: whatever is interrupted, the model at `path` finds the
    weights that it was written with.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        written = save_with_data(model, temporary)
        data = path.with_name(written.name)
        is_new = not data.exists()
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


def save_with_data(model: ir.Model, path: Path) -> Path:
    """Write a model to `path`, its large tensors to a data file beside it; return where that is.

    The file has their place, offset and length: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
    """
    copy = model.clone()
    weights = {value: value.const_value for value in copy.graph.initializers.values() if value.const_value is not None}
    large = {value: tensor for value, tensor in weights.items() if tensor.nbytes >= INLINE_BYTES}
    digest, unnamed = hashlib.sha256(), path.with_name(f"{path.name}.data")
    places = []
    with open(unnamed, "wb") as file:
        for tensor in large.values():
            content = tensor.tobytes()
            digest.update(len(content).to_bytes(8, "little"))  # other tensors may have the same bytes in sum
            digest.update(content)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            places.append((file.tell(), len(content)))
            file.write(content)
    data = unnamed.rename(path.with_name(f"{path.name}.{digest.hexdigest()[:HASH_DIGITS]}.data"))
    for (value, tensor), (offset, length) in zip(large.items(), places, strict=True):
        value.const_value = ir.ExternalTensor(
            data.name, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name_of(value)
        )
    onnx.save(message_of(copy, beside={name_of(value) for value in large}), path)
    return data
