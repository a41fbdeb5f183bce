"""A file in onnxruntime-web: WebAssembly in node, whose V8 is that of Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir

from ptq4vit_fx.errors import PTQError, failure
from ptq4vit_fx.export.model_files import data_files
from ptq4vit_fx.export.nodes import Array, name_of
from ptq4vit_fx.export.proof.running import Opened
from ptq4vit_fx.files import check_readable, scratch

OPERATION = "onnxruntime-web"
PACKAGE = Path("node_modules") / "onnxruntime-web"
PROGRAM = Path(__file__).with_suffix(".mjs")
#: Types of tensors that JavaScript has arrays of, as onnxruntime-web and numpy call them.
TYPES = frozenset(
    ["float32", "float64", "uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64", "bool"]
)


@contextmanager
def open_in_web(path: Path, model: ir.Model, npm: Path) -> Iterator[Opened]:
    """Yield a file as onnxruntime-web in node runs it, one thread.

    model: what the file holds. npm: a folder in which, or in one around which, `npm install onnxruntime-web` was run.
    Raises PTQError if node or the package is missing, and, also when it runs, on what onnxruntime-web refuses.
    """
    node, names = _node(), [name_of(value) for value in model.graph.inputs]
    check_readable(path, OPERATION, "an ONNX model")
    data = [f"{file.name}={file}" for file in sorted(data_files(path))]
    command = [node, os.fspath(PROGRAM), os.fspath(path), os.fspath(_package(npm)), *data]
    with scratch(OPERATION, 0) as folder, (folder / "errors").open("w+", encoding="utf-8") as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(command, text=True, encoding="utf-8", **pipes) as process:
            try:
                said = _answer(process, path, errors)

                def run(arrays: Sequence[Array]) -> list[Array]:
                    numbered = enumerate(zip(names, arrays, strict=True))
                    given = [_written(name, x, folder / f"input{number}") for number, (name, x) in numbered]
                    _send(process, json.dumps({"inputs": given, "folder": os.fspath(folder)}))
                    return [_read(entry) for entry in _answer(process, path, errors)["outputs"]]

                yield Opened(f"onnxruntime-web {said['web']} in node {said['node']}", run)
            finally:
                process.kill()


def _node() -> str:
    found = shutil.which("node")
    if found is None:
        do = "install Node.js 18 or newer, from https://nodejs.org or your system's packages"
        raise failure(OPERATION, "node", expected="the program on the PATH", got="none", do=do)
    return found


def _package(npm: Path) -> Path:
    """Return the folder whose node_modules has onnxruntime-web: this one or the nearest around it, as node looks."""
    place = npm.absolute()
    found = next((folder for folder in (place, *place.parents) if (folder / PACKAGE).is_dir()), None)
    if found is None:
        do = "run `npm install --ignore-scripts onnxruntime-web` there, or pass --npm with the folder that has it"
        raise failure(OPERATION, str(npm), expected="npm's package onnxruntime-web", got=f"no {PACKAGE}", do=do)
    return found


def _send(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    try:
        print(line, file=process.stdin, flush=True)
    except BrokenPipeError:  # it has ended: reading its answer says why
        return


def _answer(process: subprocess.Popen[str], path: Path, errors: IO[str]) -> dict[str, Any]:
    """Return the next line that the program prints, as JSON; raises PTQError with what it says if it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        raise _ended(path, errors)
    answer: dict[str, Any] = json.loads(line)
    return answer


def _ended(path: Path, errors: IO[str]) -> PTQError:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    said = next((line for line in lines if "Error" in line.partition(" ")[0]), next(iter(lines[-1:]), "nothing"))
    do = "look at that operator: WebAssembly has no other kernels, and 4 GB of memory at most"
    return failure(OPERATION, str(path), expected="a file that it opens and runs", got=said, do=do)


def _written(name: str, array: Array, file: Path) -> dict[str, Any]:
    """Write an input as bytes; return where and what it is."""
    kind = array.dtype.name
    if kind not in TYPES:
        do = "run it in another runtime"
        raise failure(OPERATION, f"input {name}", expected=f"one of {', '.join(sorted(TYPES))}", got=kind, do=do)
    np.ascontiguousarray(array).tofile(file)
    return {"name": name, "type": kind, "dims": list(array.shape), "file": os.fspath(file)}


def _read(entry: Mapping[str, Any]) -> Array:
    """Return an output that the program has written, and remove its bytes."""
    if entry["type"] not in TYPES:
        do, expected = "run it in another runtime", f"one of {', '.join(sorted(TYPES))}"
        raise failure(OPERATION, f"output {entry['name']}", expected=expected, got=str(entry["type"]), do=do)
    values: Array = np.fromfile(entry["file"], entry["type"]).reshape(entry["dims"])
    Path(entry["file"]).unlink()
    return values
