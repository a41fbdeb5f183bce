"""Graphs of other programs with a good file's metadata, and weights that lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from hostile import EVIL, Case, made
from hostile.places import pipe, sparse

node = helper.make_node
FLOAT, TEXT, BOOL, HALF = TensorProto.FLOAT, TensorProto.STRING, TensorProto.BOOL, TensorProto.FLOAT16
IMAGES = ("n", 3, 16, 16)


def value(name: str, shape: Sequence[Any] | None = IMAGES, kind: int = FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def logits(*shape: Any, kind: int = FLOAT) -> list[ValueInfoProto]:
    return [value("logits", shape, kind)]


def stored(name: str, array: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


AXES, WEIGHT = stored("axes", np.array([2, 3])), stored("w", np.ones((3, 5), np.float32))
STORED = (AXES, WEIGHT)


def program(
    *nodes: NodeProto,
    inputs: Sequence[ValueInfoProto] = (value("x"),),
    outputs: Sequence[ValueInfoProto] = logits("n", 5),
    stored: Sequence[TensorProto] = STORED,
    opsets: Sequence[tuple[str, int]] = (("", 20),),
    ir_version: int = 9,
    functions: Sequence[FunctionProto] = (),
) -> Case:
    """Return the case of this graph, unchecked, with the metadata of a good model."""

    def make(model: onnx.ModelProto) -> bytes:
        whole = onnx.ModelProto(ir_version=ir_version)
        whole.graph.CopyFrom(helper.make_graph(nodes, "g", inputs, outputs, list(stored)))
        whole.opset_import.extend(helper.make_opsetid(*entry) for entry in opsets)
        whole.functions.extend(functions)
        whole.metadata_props.extend(model.metadata_props)
        return whole.SerializeToString()

    return made(make)


def flat(source: str = "x", to: str = "logits") -> tuple[NodeProto, NodeProto]:
    """Return nodes that make (n, 5) of images."""
    mean = node("ReduceMean", [source, "axes"], ["mean"], "mean", keepdims=0)
    return mean, node("Gemm", ["mean", "w"], [to], "head/Gemm")


def cast(kind: int) -> Case:
    """Return the case of logits of another type."""
    return program(*flat(to="y"), node("Cast", ["y"], ["logits"], to=kind), outputs=logits("n", 5, kind=kind))


TRUE, ZERO = stored("c", np.array(True)), stored("zero", np.array(0))
HUGE = stored("shape", np.array([10**6, 10**6]))


def branches(*inside: NodeProto, inner: Sequence[TensorProto] = ()) -> Case:
    """Return the case of an If; inside it, y is (n, 5) and the result is `inner`."""
    body = helper.make_graph(inside, "branch", [], [value("inner", ("n", 5))], list(inner))
    chosen = node("If", ["c"], ["logits"], "if", then_branch=body, else_branch=body)
    return program(*flat(to="y"), chosen, stored=[*STORED, TRUE])


def nested(depth: int) -> Case:
    """Return the case of an If in an If in an If."""
    last = helper.make_graph([node("Identity", ["y"], ["inner"])], "g", [], [value("inner", ("n", 5))])
    graph = last
    for _ in range(depth):
        inside = node("If", ["c"], ["inner"], then_branch=graph, else_branch=last)
        graph = helper.make_graph([inside], "g", [], [value("inner", ("n", 5))])
    return program(*flat(to="y"), *graph.node, node("Identity", ["inner"], ["logits"]), stored=[*STORED, TRUE])


def calling(*inside: NodeProto) -> Case:
    """Return the case of a function of that body."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    functions = [helper.make_function("own", "F", ["x"], ["y"], list(inside), opsets)] if inside else []
    call = node("F", ["x"], ["y"], "call", domain="own")
    return program(call, *flat("y"), opsets=(("", 20), ("own", 1)), functions=functions)


def hollow(name: str, dims: Sequence[int], **fields: Any) -> TensorProto:
    """Return a tensor without values."""
    return TensorProto(name=name, dims=dims, data_type=FLOAT, **fields)


SEQUENCE = helper.make_tensor_sequence_value_info
EXTERNAL = TensorProto.EXTERNAL
WIDE = [AXES, stored("w", np.ones((3, 7), np.float32))]
NARROW = [AXES, stored("w", np.ones((3, 0), np.float32))]

PROGRAMS: dict[str, Case] = {
    "five classes": program(*flat()),
    "seven classes": program(*flat(), stored=WIDE, outputs=logits("n", 7)),
    "no classes": program(*flat(), stored=NARROW, outputs=logits("n", 0)),
    "a cycle": program(node("Add", ["x", "b"], ["a"]), node("Add", ["a", "x"], ["b"]), *flat("b")),
    "a node that reads itself": program(node("Add", ["x", "a"], ["a"], "self"), *flat("a")),
    "an unknown operator": program(node("Foo", ["x"], ["y"]), *flat("y")),
    "no inputs at all": program(node("Identity", ["w"], ["logits"]), inputs=[]),
    "no outputs at all": program(*flat(), outputs=[]),
    "two inputs": program(*flat(), inputs=[value("x"), value("z")]),
    "two outputs": program(*flat(), outputs=[*logits("n", 5), value("mean", ("n", 3))]),
    "a scalar": program(node("ReduceMean", ["x"], ["logits"], keepdims=0), outputs=logits()),
    "an input without a type": program(*flat(), inputs=[ValueInfoProto(name="x")]),
    "a scalar input": program(*flat(), inputs=[value("x", ())]),
    "one result whatever comes in": program(node("Identity", ["w"], ["logits"])),
    "logits of text": cast(TEXT),
    "logits of booleans": cast(BOOL),
    "logits of float16": cast(HALF),
    "a sequence of logits": program(
        *flat(to="y"), node("SequenceConstruct", ["y"], ["logits"]), outputs=[SEQUENCE("logits", FLOAT, None)]
    ),
    "a sequence of images": program(
        node("SequenceAt", ["x", "zero"], ["y"]),
        *flat("y"),
        stored=[*STORED, ZERO],
        inputs=[SEQUENCE("x", FLOAT, None)],
    ),
    "fails when it runs": program(
        *flat(to="y"), node("Reshape", ["y", "axes"], ["logits"], f"reshape{EVIL}"), outputs=logits(None, None)
    ),
    "makes 4 TB when it is opened": program(
        node("Expand", ["w", "shape"], ["big"]), node("Add", ["x", "big"], ["y"]), *flat("y"), stored=[*STORED, HUGE]
    ),
    "makes 4 TB when it runs": program(
        *flat(to="y"),
        node("ReduceMax", ["y"], ["m"], keepdims=0),
        node("Expand", ["m", "shape"], ["logits"]),
        stored=[*STORED, HUGE],
        outputs=logits(None, None),
    ),
    "an If": branches(node("Identity", ["y"], ["inner"])),
    "an If with a tensor of 4 TB": branches(node("Add", ["y", "t"], ["inner"]), inner=[hollow("t", (10**6, 10**6))]),
    "an If with weights elsewhere": branches(
        node("Gemm", ["mean", "v"], ["inner"]), inner=[hollow("v", (3, 5), data_location=EXTERNAL)]
    ),
    "Ifs within each other": nested(30),
    "a constant of 4 TB": program(node("Constant", [], ["k"], value=hollow("k", (10**6, 10**6))), *flat()),
    "a function": calling(node("Relu", ["x"], ["y"])),
    "a function that calls itself": calling(node("F", ["x"], ["y"], domain="own")),
    "a function that is not there": calling(),
    "another IR version 99": program(*flat(), ir_version=99),
    "another opset 99": program(*flat(), opsets=(("", 99),)),
    "a tensor of three bytes": program(*flat(), stored=[AXES, hollow("w", (3, 5), raw_data=b"abc")]),
}


def data(folder: Path, size: int = 60) -> str:
    (folder / "weights").write_bytes(np.ones(size // 4, np.float32).tobytes())
    return "weights"


def outside(folder: Path) -> str:
    (folder.parent / "secret").write_bytes(bytes(60))
    return "../secret"


def linked(folder: Path) -> str:
    outside(folder)
    (folder / "weights").symlink_to(folder.parent / "secret")
    return "weights"


def inner_folder(folder: Path) -> str:
    (folder / "weights").mkdir()
    return "weights"


def elsewhere(make: Callable[[Path], str], offset: Any = 0, length: Any = 60, dims: Sequence[int] = (3, 5)) -> Case:
    """Return the case of weights beside the file. make: puts something there and returns what the file calls it."""

    def write(model: onnx.ModelProto, folder: Path) -> Path:
        weight = hollow("w", dims, data_location=EXTERNAL)
        for key, entry in {"location": make(folder), "offset": offset, "length": length}.items():
            if entry is not None:
                weight.external_data.add(key=key, value=str(entry))
        return program(*flat(), stored=[AXES, weight])(model, folder)

    return write


WEIGHTS: dict[str, Case] = {
    "good weights elsewhere": elsewhere(data),
    "missing weights": elsewhere(lambda _: "none"),
    "weights that are short": elsewhere(lambda folder: data(folder, 40)),
    "weights in 8 bytes": elsewhere(data, length=8),
    "weights in 1 TB": elsewhere(data, length=10**12),
    "weights at -60": elsewhere(data, offset=-60),
    "weights at x": elsewhere(data, offset="x"),
    "weights at 2^62": elsewhere(data, offset=2**62),
    "1e12 weights": elsewhere(data, dims=(10**12,), length=None),
    "8 TB of nothing as weights": elsewhere(
        lambda folder: sparse(folder, "weights", 2**43).name, dims=(2**41,), length=2**43
    ),
    "weights outside": elsewhere(outside),
    "weights at an absolute path": elsewhere(lambda folder: str(folder / data(folder))),
    "/etc/passwd as weights": elsewhere(lambda _: "/etc/passwd"),
    "weights linked outside": elsewhere(linked),
    "a pipe as weights": elsewhere(lambda folder: pipe(folder, "weights").name),
    "a device as weights": elsewhere(lambda _: "/dev/zero"),
    "a folder as weights": elsewhere(inner_folder),
    "the file itself as weights": elsewhere(lambda _: "model.onnx"),
    "weights without a name": elsewhere(lambda _: ""),
    "weights with a null byte": elsewhere(lambda _: "a\0b"),
}
