"""Weights alone beside int8 on both sides, in ONNX Runtime: size, accuracy and time of the files.

    python examples/weights_alone.py vit_s14 --fixtures ../shared/fixtures

All files hold the scales and codes of the recipe `best`, of 32 images of `calib`; weights of 4 bits are packed. A file
of weights alone is run as the runtime likes it, which quantizes activations itself, and exactly, with float ones
(docs/targets.md). Top-1, agreement and KL from float are those of the first images of `val`, times medians of rounds in
turn. The fixtures folder is described in accuracy.py.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from simulate import Source, answers, open_source, score
from torch import Tensor

import ptq4vit_fx as ptq
from ptq4vit_fx.export.contract import INT4_OPSET
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.proof.latency import in_turn
from ptq4vit_fx.export.proof.runtime import in_turn_options, open_model
from ptq4vit_fx.export.traps import ACCURACY_LEVEL, EXACT

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
#: Name -> bits of weights and activations, target.
FILES = {
    "W8A8": (8, 8, "onnxruntime"),
    "W4A8": (4, 8, "generic"),
    "W8A32": (8, 32, "generic"),
    "W4A32": (4, 32, "generic"),
}


def running(path: Path, *, exact: bool, threads: int) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits; exact: in a session that leaves float activations float."""
    options = in_turn_options(threads)
    if exact:
        options.add_session_config_entry(ACCURACY_LEVEL, EXACT)
    session = open_model(load_file(path), options=options)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def written(source: Source, folder: Path) -> dict[str, Path]:
    """Write the float file and the quantized ones; return name -> path."""
    images, paths = source.calibration_images(0), {"float": folder / "float.onnx"}
    export_float(source.network, paths["float"], images[:1])
    for name, (weights, activations, target) in FILES.items():
        prepared = ptq.prepare_fx(source.network, ptq.recipes.best(weights, activations), images[:1])
        ptq.calibrate(prepared, images)
        paths[name] = folder / f"{name}.onnx"
        options: dict[str, Any] = {"target": target} | ({"opset": INT4_OPSET} if target == "generic" else {})
        ptq.export_onnx(ptq.convert_fx(prepared), paths[name], images[:1], **options)
    return paths


@app.command(help=__doc__)
def main(
    model: str,
    fixtures: Annotated[Path, typer.Option(help="folder with trained models and images")],
    images: Annotated[int, typer.Option(help="validation images")] = 500,
    batch: Annotated[int, typer.Option(help="images at a time, of the timings")] = 8,
    threads: int = 2,
    rounds: int = 15,
    scales: Annotated[Path, typer.Option(help="folder of the float model's answers")] = Path("out/scales"),
) -> None:
    """Print one Markdown row per file, and per way to run it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    source = open_source(model, fixtures, images, scales)
    with tempfile.TemporaryDirectory() as folder:
        paths = written(source, Path(folder))
        megabytes = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
        runs = {name: running(path, exact=False, threads=threads) for name, path in paths.items()}
        runs |= {f"{name}, exact": running(paths[name], exact=True, threads=threads) for name in ("W8A32", "W4A32")}
    timed = source.calibration_images(0, batch)
    taken = in_turn({name: partial(run, timed) for name, run in runs.items()}, rounds=rounds)
    print("| file | MB | top-1 | agrees with float | KL | ms per image | times float |\n|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        found = score(answers(run, source, name), source)
        milliseconds, ratio = taken.spread(name).median / batch, taken.ratio("float", name).median
        print(f"| {name} | {megabytes[name.removesuffix(', exact')]:.1f} | {found.right:.2%} ", end="")
        print(f"| {found.agreement:.2%} | {found.divergence:.2g} | {milliseconds:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    app()
