"""`ptq4vit demo`: the embedded digits model through the whole pipeline, as a table and a picture."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx import recipes
from ptq4vit_fx.api import calibrate, convert_fx, prepare_fx
from ptq4vit_fx.capture import capture, pseudo_label_loss
from ptq4vit_fx.digits import load_digits_images, load_digits_model
from ptq4vit_fx.export.onnx_export import export_onnx
from ptq4vit_fx.export.runtime import open_session
from ptq4vit_fx.files import atomic_path
from ptq4vit_fx.passes.contract import calibration_of, plan_of
from ptq4vit_fx.quantizers import TwinParams, TwinUniform, Uniform

CALIBRATION_IMAGES = 32


def run_demo(folder: Path, console: Console) -> None:
    """Quantize at W8A8, W6A6 and W4A4 with both recipes, export, run, print the table, save twin_grids.png."""
    folder.mkdir(parents=True, exist_ok=True)
    model = load_digits_model()
    images = load_digits_images("train")[0][:CALIBRATION_IMAGES]
    test, labels = load_digits_images("test")
    with torch.inference_mode():
        float_top1 = float((model(test).argmax(1) == labels).float().mean())
    table = Table(title=f"digits ViT, {len(test)} test images, {len(images)} calibration images")
    for column in ("recipe", "bits", "float top-1", "simulated", "ONNX Runtime", "file", "calibration"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    runs = [(bits, name) for bits in (8, 6, 4) for name in ("base_ptq", "ptq4vit")]
    for bits, name in track(runs, "demo", console=console):
        prepared = prepare_fx(model, getattr(recipes, name)(bits, bits), images[:1])
        calibration = calibrate(prepared, images, progress=False)
        converted = convert_fx(prepared)
        path = folder / f"digits_{name}_w{bits}a{bits}.onnx"
        exported = export_onnx(converted, path, images[:1])
        session = open_session(path)
        logits = session.run(None, {session.get_inputs()[0].name: test.numpy()})[0]
        with torch.inference_mode():
            simulated = float((converted(test).argmax(1) == labels).float().mean())
        table.add_row(
            name,
            f"W{bits}A{bits}",
            f"{float_top1:.2%}",
            f"{simulated:.2%}",
            f"{float((logits.argmax(1) == labels.numpy()).mean()):.2%}",
            f"{exported.bytes / 1e3:.0f} kB",
            f"{calibration.provenance['seconds']:.1f} s",
        )
    console.print(table)
    picture = folder / "twin_grids.png"
    draw_grids(prepared, images, picture)
    console.print(f"picture: {picture}", markup=False)


def draw_grids(prepared: GraphModule, images: Tensor, path: str | os.PathLike[str]) -> None:
    """Draw a softmax and a GELU histogram with the uniform and the calibrated twin grid over each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plan, calibration = plan_of(prepared), calibration_of(prepared)
    assert calibration is not None
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for row, source in enumerate(("softmax", "gelu")):
        op = next(op for op in plan.ops if op.lhs_source == source)
        seen = capture(prepared, [op], [images], loss=pseudo_label_loss, with_gradient=False)[op.name]
        values = torch.cat(seen.lhs).flatten()
        twin, params = plan.quantizers[f"{op.name}:lhs"], calibration.params[f"{op.name}:lhs"]
        assert isinstance(twin, TwinUniform)
        assert isinstance(params, TwinParams)
        uniform = Uniform(twin.bits)
        levels = {
            "uniform": torch.unique(uniform.fake_quantize(values.clone(), uniform.initial_scale(values.abs().max()))),
            "twin": torch.unique(twin.fake_quantize(values.clone(), params)),
        }
        for column, (name, grid) in enumerate(levels.items()):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            axes.hist(values.numpy(), bins=200, log=True, color="0.7")
            for level in np.asarray(grid):
                axes.axvline(level, color="tab:red" if name == "uniform" else "tab:blue", linewidth=0.8)
            axes.set_title(f"{op.name}, after {source}: {name} grid, {twin.bits} bits, {len(grid)} levels in use")
            axes.set_xlabel("value")
            axes.set_ylabel("count (log)")
    with atomic_path(path, "save picture") as temporary:
        figure.savefig(temporary, dpi=100)
