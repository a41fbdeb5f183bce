"""`ptq4vit demo`: the embedded digits model through the whole pipeline, as a table and a picture."""

from __future__ import annotations

import io
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx import recipes
from ptq4vit_fx.api import calibrate, convert_fx, prepare_fx
from ptq4vit_fx.calibrating.capture import capture
from ptq4vit_fx.calibrating.losses import pseudo_label
from ptq4vit_fx.errors import check_extra
from ptq4vit_fx.export.onnx_export import export_onnx
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.files import check_writable, make_folder, write_file
from ptq4vit_fx.inputs.progress import UnderWay
from ptq4vit_fx.passes.graph.contract import calibration_of, plan_of
from ptq4vit_fx.quantizers import TwinUniform, Uniform, UniformParams
from ptq4vit_fx.tools.digits import load_digits_images, load_digits_model
from ptq4vit_fx.tools.phases import DEMO, Phases

CALIBRATION_IMAGES = 32
PICTURE = "twin_grids.png"


@dataclass(frozen=True)
class Run:
    """One row of the demo's table: what to do, and after `_quantize` what came out of it."""

    recipe: str
    bits: int
    simulated: float = 0.0
    deployed: float = 0.0
    file_bytes: int = 0
    seconds: float = 0.0


RUNS = tuple(Run(recipe, bits) for bits in (8, 6, 4) for recipe in ("base_ptq", "ptq4vit"))


@dataclass(frozen=True)
class Demo:
    """The rows of the demo's table, top-1 of the float model on the test images, and the picture that was drawn."""

    runs: tuple[Run, ...]
    float_top1: float
    test_images: int
    picture: Path

    def table(self) -> Table:
        """Return what a terminal shows."""
        title = f"digits ViT, {self.test_images} test images, {CALIBRATION_IMAGES} calibration images"
        table = Table(title=title)
        for column in ("recipe", "bits", "float", "simulated", "ONNX Runtime", "file", "calibrated in"):
            table.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
        for run in self.runs:
            table.add_row(
                run.recipe,
                f"W{run.bits}A{run.bits}",
                f"{self.float_top1:.2%}",
                f"{run.simulated:.2%}",
                f"{run.deployed:.2%}",
                f"{run.file_bytes / 1e3:.0f} kB",
                f"{run.seconds:.1f} s",
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return every number, JSON-ready."""
        return asdict(self)


def run_demo(folder: Path, phases: Phases) -> Demo:
    """Quantize at W8A8, W6A6 and W4A4 with both recipes, export, run, save twin_grids.png; return the table.

    Export is single-threaded Python, so the runs are spread over processes, one thread each.
    """
    check_extra("demo", "the digits and the picture", "demo", "sklearn", "matplotlib")
    make_folder(folder, "demo --out")
    check_writable(folder / PICTURE, "demo --out")
    test, labels = load_digits_images("test")
    float_top1 = _top1(load_digits_model()(test), labels)
    workers = min(len(RUNS) + 1, os.cpu_count() or 1)
    with phases(DEMO), ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
        try:
            picture = pool.submit(draw_grids, folder / PICTURE)
            runs = list[Run]()
            for run in pool.map(_quantize, RUNS, repeat(folder)):
                runs.append(run)
                phases.show(UnderWay(DEMO, len(runs), len(RUNS), "models"))
            picture.result()
        finally:  # an error or Ctrl-C does not wait for what has not started
            pool.shutdown(cancel_futures=True)
    return Demo(tuple(runs), float_top1, len(test), folder / PICTURE)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the demo, which ends its workers
    torch.set_num_threads(1)


@torch.inference_mode()
def _top1(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def _calibrated(recipe: str, bits: int) -> GraphModule:
    images = load_digits_images("train")[0][:CALIBRATION_IMAGES]
    prepared = prepare_fx(load_digits_model(), getattr(recipes, recipe)(bits, bits), images[:1])
    calibrate(prepared, images, progress=False)
    return prepared


def _quantize(run: Run, folder: Path) -> Run:
    """Return the run with its results; write its ONNX file to the folder."""
    prepared = _calibrated(run.recipe, run.bits)
    converted = convert_fx(prepared)
    test, labels = load_digits_images("test")
    path = folder / f"digits_{run.recipe}_w{run.bits}a{run.bits}.onnx"
    exported = export_onnx(converted, path, test[:1])
    session = open_session(path, threads=1)
    logits = session.run(None, {session.get_inputs()[0].name: test.numpy()})[0]
    calibration = calibration_of(prepared)
    assert calibration is not None
    with torch.inference_mode():
        simulated = _top1(converted(test), labels)
    return replace(
        run,
        simulated=simulated,
        deployed=_top1(torch.from_numpy(logits), labels),
        file_bytes=exported.bytes,
        seconds=calibration.provenance["seconds"],
    )


def draw_grids(path: Path) -> None:
    """Draw a softmax and a GELU histogram of the W4A4 model with the uniform and the twin grid over each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    prepared = _calibrated("ptq4vit", 4)
    images = load_digits_images("train")[0][:CALIBRATION_IMAGES]
    plan, calibration = plan_of(prepared), calibration_of(prepared)
    assert calibration is not None
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for row, source in enumerate(("softmax", "gelu")):
        op = next(op for op in plan.ops if op.lhs_source == source)
        seen = capture(prepared, [op], [(images,)], loss=pseudo_label, with_gradient=False)[op.name]
        values = torch.cat(seen.lhs).flatten()
        twin, params = plan.quantizers[f"{op.name}:lhs"], calibration.params[f"{op.name}:lhs"]
        assert isinstance(twin, TwinUniform)
        uniform = Uniform(twin.bits)
        initial = UniformParams(uniform.initial_scale(values.abs().max()))
        levels = {
            "uniform": torch.unique(uniform.fake_quantize(values.clone(), initial)),
            "twin": torch.unique(twin.fake_quantize(values.clone(), params)),
        }
        for column, (name, grid) in enumerate(levels.items()):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            axes.hist(values.numpy(), bins=200, log=True, color="0.7")
            for level in np.asarray(grid):
                axes.axvline(level, color="tab:red" if name == "uniform" else "tab:blue", linewidth=0.8)
            axes.set_title(f"{op.name}, after {source}\n{name} grid, {twin.bits} bits, {len(grid)} levels in use")
            axes.set_xlabel("value")
            axes.set_ylabel("count (log)")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_file(path, picture.getvalue(), "save picture")
