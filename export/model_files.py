"""ONNX files on disk: one file, or a model and a data file beside it where protobuf cannot hold the weights.

In memory a model is onnx_ir's: its tensors lie where they were made, or still in the file. Nothing here takes a tensor
away from a model that it was given.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import onnx
import onnx_ir as ir

from ptq4vit_fx.errors import failure, foreign
from ptq4vit_fx.export.nodes import name_of
from ptq4vit_fx.files import alone, check_readable, check_writable, flush, move, not_a_file, workplace
from ptq4vit_fx.inputs.sizes import check_memory

#: Weights above this leave the protobuf file, whose limit is 2^31 bytes: https://protobuf.dev/programming-guides/proto-limits
#: (16 MiB stay for nodes and names).
PROTOBUF_LIMIT = 2**31 - 2**24
#: Smaller tensors stay in the model file: shapes and scales must be readable without the data.
INLINE_BYTES = 1024
#: Where a tensor starts in the data file: a page, so that runtimes can map it into memory.
ALIGNMENT = 4096
#: Bytes of a name on the file systems in use.
LONGEST_NAME = 255
#: Hexadecimal digits of the weights' hash in the name of a data file.
HASH_DIGITS = 16
#: A value of so many bytes may take one in a file: an integer that is small, such as the sizes of shapes.
SMALLEST_VALUE = 8

#: Graphs in nodes (If, Loop, Scan) in graphs in nodes, and functions in functions: older releases of runtimes take
#: twice as long for each one more, and end the process where a function calls itself.
MOST_NESTED = 8

OPERATION = "read ONNX file"

#: Whether this thread reads a file that anybody may have written.
_READING = ContextVar("ptq4vit_fx_reading", default=False)
for _name in ("onnx_ir.serde", "onnx_ir._core", "onnx_ir._graph_containers", "onnx_ir.external_data"):
    logging.getLogger(_name).addFilter(lambda _: not _READING.get())


def load_file(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file; weights beside it are read when they are needed.

    Raises PTQError if it is no ONNX model, if weights are missing, lie outside of its folder or are no files, if it
    says that it holds more than it does, or than memory does, and if its graphs are in each other without end.
    """
    size = check_readable(path, OPERATION, "an ONNX model").stat().st_size
    if size > 2**31 - 1:
        do = "write it with its weights beside it, as onnx.save does with save_as_external_data"
        expected, got = "an ONNX model, which has less than 2 GiB without the weights beside it", f"{size} bytes"
        raise failure(OPERATION, str(path), expected=expected, got=got, do=do)
    check_memory(OPERATION, str(path), 2 * size, what="a file of that size", do="read it where there is more")
    with unreadable(OPERATION, path, "an ONNX model"):
        model = ir.load(path)
        external = [tensor.path for tensor in tensors_of(model) if isinstance(tensor, ir.ExternalTensor)]
        if not all(map(os.path.exists, external)):
            model = ir.load(Path(path).resolve())  # of a link: its weights lie beside it, or beside what it leads to
        _check_nesting(model, Path(path))
        _check_tensors(model, Path(path), size)
    return model


@contextmanager
def unreadable(operation: str, path: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """Turn whatever reading a file of somebody else raises inside into a PTQError that names the file.

    What onnx_ir logs meanwhile, with names of the file as they are, is not heard.
    """
    do = "export the file again: it is damaged, or another program wrote or changed it"
    before = _READING.set(True)
    try:
        with foreign(operation, str(path), expected=expected, do=do):
            yield
    finally:
        _READING.reset(before)


def _check_nesting(model: ir.Model, path: Path) -> None:
    """Raise PTQError if there are more than MOST_NESTED graphs or functions around a node, or a function in itself."""
    waiting: list[tuple[ir.Graph | ir.Function, int]] = [(model.graph, 0)]
    deepest: dict[int, int] = {}
    while waiting:
        graph, depth = waiting.pop()
        if depth > MOST_NESTED:
            do = "export it again without branches inside of branches"
            expected, got = f"at most {MOST_NESTED} graphs or functions around a node of an ONNX model", "more"
            raise failure(OPERATION, str(path), expected=expected, got=got, do=do)
        if deepest.get(id(graph), -1) >= depth:
            continue
        deepest[id(graph)] = depth
        for node in graph:
            waiting += [(inner, depth + 1) for inner in _graphs_in(node)]
            if (called := model.functions.get(node.op_identifier())) is not None:
                waiting.append((called, depth + 1))


def _graphs_in(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that a node has as attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _check_tensors(model: ir.Model, path: Path, size: int) -> None:
    """Raise PTQError on tensors whose values are not where they should be. size: bytes of the file."""
    folder, beside = path.resolve().parent, 0
    for tensor in (*tensors_of(model), *_inner_tensors(model)):
        got = ""
        if any(length < 0 for length in tensor.shape.numpy()):
            got = f"a tensor {tensor.name} of shape {tuple(tensor.shape.numpy())}"
        elif isinstance(tensor, ir.ExternalTensor):
            got = _misplaced(tensor, folder)
            beside += tensor.nbytes
        elif tensor.nbytes > SMALLEST_VALUE * size:
            got = f"a tensor {tensor.name} of {tensor.nbytes} bytes in a file of {size}"
        if got:
            do = "copy it again with the files beside it, or export it again"
            raise failure(OPERATION, str(path), expected="an ONNX model with its weights", got=got, do=do)
    check_memory(OPERATION, str(path), beside, what="the weights beside it", do="read it where there is more")


def _inner_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield the tensors of the nodes' attributes, of graphs inside of nodes, and of functions."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()
            for inner in _graphs_in(node):
                yield from (v.const_value for v in inner.initializers.values() if v.const_value is not None)


def _misplaced(tensor: ir.ExternalTensor, folder: Path) -> str:
    """Return what is wrong with the place of a tensor beside a file, "" if its bytes are there."""
    if not Path(tensor.path).resolve().is_relative_to(folder):
        return f"the weights {tensor.name} lie outside of the file's folder, at {tensor.path}"
    other = not_a_file(tensor.path)
    if other:
        return f"the weights {tensor.name} at {tensor.path}: {other}"
    offset, length = tensor.offset or 0, tensor.length
    if offset < 0 or (length is not None and length != tensor.nbytes):
        return f"the weights {tensor.name}, {tensor.nbytes} bytes, in {length} bytes from {offset} on"
    end = tensor.nbytes + offset
    return f"{tensor.path} ends in front of byte {end}, where {tensor.name} does" * (os.path.getsize(tensor.path) < end)


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
    target, is_large = check_writable(path, operation), is_too_large(model)
    content = b"" if is_large else _checked(message_of(model))
    needed = len(content) or sum(tensor.nbytes + ALIGNMENT for tensor in tensors_of(model))
    with workplace(target, operation, needed) as folder:
        written = folder / target.name
        data = [save_with_data(model, written)] if is_large else []
        if is_large:
            onnx.checker.check_model(str(written), full_check=True)
        else:
            written.write_bytes(content)
        for file in (written, *data):  # which may take long, and keeps nobody waiting
            flush(file)
        size = sum(file.stat().st_size for file in (written, *data))
        with alone(target):
            _move_all(written, data, target)
    return size


def _checked(message: onnx.ModelProto) -> bytes:
    onnx.checker.check_model(message, full_check=True)
    content: bytes = message.SerializeToString()
    return content


def _move_all(written: Path, data: Sequence[Path], target: Path) -> None:
    """Give the data file its name, then the model, and remove the data files of what was there before.

    A data file is named by its content: whatever is interrupted, the model at `target` finds the weights that it was
    written with. Nobody else may do this to the same path meanwhile.
    """
    own = [target.with_name(file.name) for file in data]
    new = [file for file in own if not file.exists()]
    for file, place in zip(data, own, strict=True):
        move(file, place)
    try:
        move(written, target)
    except OSError:
        for place in new:
            place.unlink()
        raise
    for stale in data_files(target) - set(own):
        with suppress(OSError):  # the model is complete
            stale.unlink()


def data_files(path: Path) -> set[Path]:
    """Return the data files that `write_model` left for this path: `<name>.<hash of the weights>.data`."""
    return set(path.parent.glob(f"{glob.escape(_data_stem(path.name))}.{'[0-9a-f]' * HASH_DIGITS}.data"))


def _data_stem(name: str) -> str:
    """Return how the names of the data files of a model start: its own, a hash of that where it leaves no room."""
    name_bytes, more = os.fsencode(name), HASH_DIGITS + len("..data")
    return name if len(name_bytes) + more <= LONGEST_NAME else hashlib.sha256(name_bytes).hexdigest()


def save_with_data(model: ir.Model, path: Path) -> Path:
    """Write a model to `path`, its large tensors to a data file beside it; return where that is.

    The file has their place, offset and length: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
    """
    copy = model.clone()
    weights = {value: value.const_value for value in copy.graph.initializers.values() if value.const_value is not None}
    large = {value: tensor for value, tensor in weights.items() if tensor.nbytes >= INLINE_BYTES}
    digest, unnamed = hashlib.sha256(), path.with_name("unnamed.data")
    places = []
    with open(unnamed, "wb") as file:
        for tensor in large.values():
            content = tensor.tobytes()
            digest.update(len(content).to_bytes(8, "little"))  # other tensors may have the same bytes in sum
            digest.update(content)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            places.append((file.tell(), len(content)))
            file.write(content)
    data = unnamed.rename(path.with_name(f"{_data_stem(path.name)}.{digest.hexdigest()[:HASH_DIGITS]}.data"))
    for (value, tensor), (offset, length) in zip(large.items(), places, strict=True):
        value.const_value = ir.ExternalTensor(
            data.name, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name_of(value)
        )
    path.write_bytes(message_of(copy, beside={name_of(value) for value in large}).SerializeToString())
    return data
