"""`ptq4vit bench`: how long a file takes on this machine, beside others, in the runtimes that are installed."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ptq4vit_fx.errors import PTQError, failure, foreign, unknown_name
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.nodes import DEQUANTIZE
from ptq4vit_fx.export.pixels import image_shape, pixels_of
from ptq4vit_fx.export.proof.instructions import cpu_instructions
from ptq4vit_fx.export.proof.latency import OPERATION, Opened, in_turn
from ptq4vit_fx.export.proof.openvino_runtime import compile_openvino
from ptq4vit_fx.export.proof.static_baseline import write_static
from ptq4vit_fx.files import scratch
from ptq4vit_fx.inputs.progress import UnderWay
from ptq4vit_fx.inputs.sizes import COPIES, FLOAT_BYTES, check_memory
from ptq4vit_fx.tools.bench_report import BenchReport, Timed
from ptq4vit_fx.tools.classifiers import is_file
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tools.phases import ROUNDS, Phases
from ptq4vit_fx.tools.remade import float_network

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
RUNTIMES = (ONNXRUNTIME, OPENVINO)
#: Random images that quantize_static sees: values change no speed.
IMAGES = 4
Run = Callable[[], Any]


@dataclass(frozen=True)
class BenchRequest:
    """What `ptq4vit bench` is asked for, by the names of its options; runtime: () for all that are installed."""

    file: Path
    against: tuple[str, ...] = ()
    threads: int = 0
    batch: int | None = None
    rounds: int | None = None
    runtime: tuple[str, ...] = ()
    static: bool = False
    model_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class _File:
    """A file that is timed. is_float: it has no quantized tensor."""

    name: str
    opened: Opened
    is_float: bool


def bench_file(request: BenchRequest, phases: Phases) -> BenchReport:
    """Run the file and what it is compared with in turn, in every runtime; return what each took.

    phases: shows what is under way. Raises PTQError on a file that cannot be read or run, on a runtime that is asked
    for and not there, and on options that do not go together.
    """
    runtimes = _runtimes(request.runtime)
    with contextlib.ExitStack() as stack:
        with phases("open files"):
            files = [_opened(str(request.file), request.file, request.threads)]
            count = _batch(request, files[0])
            files += [_compared(request, against, files[0], count, stack) for against in request.against]
        if request.static:
            with phases("quantize_static"):
                files += _static(files, request.threads, stack)
        runs, problems = _runs(request, runtimes, files, count)
        with phases(ROUNDS):
            moment = partial(UnderWay, ROUNDS, unit="rounds")
            found = in_turn(runs, rounds=request.rounds, show=lambda done, most: phases.show(moment(done, most)))
    own = str(request.file)
    rows = tuple(
        Timed(runtime, name, found.spread((runtime, name)), _ratio(found, runtime, name, own))
        for runtime, name in found.milliseconds
    )
    instructions = cpu_instructions()
    return BenchReport(
        file=own,
        rows=rows,
        float_files=tuple(file.name for file in files if file.is_float),
        images=count,
        threads=request.threads,
        rounds=found.rounds,
        cpu=str(instructions),
        cores=os.cpu_count() or 1,
        versions={runtime: version(runtime) for runtime in runtimes},
        problems=tuple(problems),
    )


def _runs(
    request: BenchRequest, runtimes: Sequence[str], files: Sequence[_File], count: int
) -> tuple[dict[tuple[str, str], Run], list[str]]:
    """Return what runs each file in each runtime, and what a runtime that nobody asked for does not run."""
    runs, problems = dict[tuple[str, str], Run](), list[str]()
    for runtime in runtimes:
        for file in files:
            try:
                runs[runtime, file.name] = _run_of(runtime, file, count, request.threads)
            except PTQError as error:
                if runtime == ONNXRUNTIME or request.runtime:
                    raise
                problems.append(f"{runtime} does not run {file.name}: {error}")
    return runs, problems


def _ratio(found: Any, runtime: str, name: str, own: str) -> Any:
    """Return how many times longer a file takes than the user's in the same runtime, None of that itself."""
    if name == own or (runtime, own) not in found.milliseconds:
        return None
    return found.ratio((runtime, name), (runtime, own))


def _runtimes(asked: Sequence[str]) -> tuple[str, ...]:
    """Return the runtimes to time in; raises PTQError on one that is unknown or not installed."""
    for name in asked:
        if name not in RUNTIMES:
            raise unknown_name("bench", "--runtime", name, RUNTIMES)
        if find_spec(name) is None:
            do = "pip install 'ptq4vit-fx[openvino]', or leave it out"
            raise failure("bench", f"--runtime {name}", expected="a package that is installed", got="none", do=do)
    return tuple(name for name in RUNTIMES if (name in asked if asked else find_spec(name) is not None))


def _opened(name: str, path: str | os.PathLike[str], threads: int) -> _File:
    opened = Opened.of(os.fspath(path), threads)
    kinds = {node.op_type for node in load_file(path).graph}
    return _File(name, opened, not kinds & {DEQUANTIZE, "MatMulInteger", "ConvInteger", "QLinearMatMul"})


def _batch(request: BenchRequest, file: _File) -> int:
    """Return how many images run at a time; raises PTQError if a file takes another number only."""
    fixed = file.opened.fixed
    if request.batch is not None and fixed not in (None, request.batch):
        got, do = f"a file that takes {fixed} at a time", "leave --batch out"
        raise failure("bench", f"--batch {request.batch}", expected="a file of any batch", got=got, do=do)
    count = request.batch or fixed or 1
    sizes = [size for entry in file.opened.session.get_inputs() for size in entry.shape[1:] if isinstance(size, int)]
    need, what = COPIES * FLOAT_BYTES * count * math.prod(sizes), "so many images at once"
    check_memory("bench", f"--batch {count}", need, what=what, do="choose a smaller one")
    return count


def _compared(request: BenchRequest, against: str, file: _File, count: int, stack: contextlib.ExitStack) -> _File:
    """Return what the file is compared with: another file, or the float file of a model by name."""
    if any(against == name for name in (file.name, *request.against[: request.against.index(against)])):
        do = "name each file once"
        raise failure("bench", f"--against {against}", expected="another file", got="one that is timed", do=do)
    if is_file(against):
        other = _opened(against, against, request.threads)
        if other.opened.fixed not in (None, count):
            got, do = f"one that takes {other.opened.fixed} at a time", "export it again, or pass --batch"
            expected = f"a file that takes {count} image{'s' * (count > 1)} at a time"
            raise failure("bench", f"--against {against}", expected=expected, got=got, do=do)
        return other
    asked = Asked(against, arguments=request.model_args, pretrained=False)
    model = float_network("bench", request.file, asked)
    session = file.opened.session
    pixels = pixels_of(session, file.opened.path, OPERATION)
    shape = image_shape(session, pixels)[1:] if len(session.get_inputs()) == 1 else []
    sizes = [size for size in shape if isinstance(size, int)]
    if not shape or len(sizes) < len(shape):
        do = "write its float file with `ptq4vit quantize --float-onnx`, and pass that"
        raise failure("bench", f"--against {against}", expected="a file of one image input", got=str(shape), do=do)
    folder = stack.enter_context(scratch("bench", sum(x.nbytes for x in model.state_dict().values())))
    example, fixed = torch.zeros(1, *sizes), file.opened.fixed
    export_float(model, folder / "float.onnx", example, batch=fixed)
    return replace(_opened(against, folder / "float.onnx", request.threads), is_float=True)


def _static(files: list[_File], threads: int, stack: contextlib.ExitStack) -> list[_File]:
    """Return what quantize_static makes of the first float file; raises PTQError if there is none that it takes."""
    source = next((file for file in files if file.is_float), None)
    if source is None:
        do = "add --against FLOAT.onnx, or the name of the model"
        raise failure("bench", "--static", expected="a float file to quantize", got="none", do=do)
    size = os.path.getsize(source.opened.path)
    folder = stack.enter_context(scratch("bench", 3 * size))
    (name,) = (entry.name for entry in source.opened.session.get_inputs()[:1])
    images = [source.opened.random(source.opened.fixed or 1)[0] for _ in range(IMAGES)]
    written = write_static(source.opened.path, folder, name, images)
    return [_opened(key, path, threads) for key, path in written.items()]


def _run_of(runtime: str, file: _File, count: int, threads: int) -> Run:
    """Return what runs a file once in a runtime."""
    if runtime == ONNXRUNTIME:
        return file.opened.runs(count)
    compiled, feed = compile_openvino(file.opened.path, threads=threads), file.opened.random(count)
    do = "write one with --target openvino, or pass --runtime onnxruntime"
    with foreign("bench", f"{file.name} in OpenVINO", expected="a file that it runs", do=do):
        compiled(feed)
    return lambda: compiled(feed)
