"""What each part of a recipe is worth: `paper`, the parts of PTQ4ViT, and `steps`, what is done beyond it.

    python examples/ablation.py paper deit_tiny_p8_64 --fixtures ../shared/fixtures
    python examples/ablation.py steps deit_tiny_p8_64 --fixtures ../shared/fixtures

`paper`: the Hessian-guided metric, the softmax twin and the GELU twin, each on and off. Everything else is the recipe
`ptq4vit`; without the Hessian-guided metric the scales are chosen by cosine similarity, and without a twin its operand
gets one uniform scale. Top-1 is ONNX Runtime's, on the exported file.

`steps`: what the literature does in front of the search and behind it, one by one and together, on the quantizers and
the search of `ptq4vit`, so that only the step differs. Measured as simulate.py does. The fixtures folder is described
in accuracy.py.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from rich.progress import track
from simulate import open_source, print_table
from torch import Tensor, nn

import ptq4vit_fx as ptq
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.passes.graph.contract import plan_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
BATCH = 25
#: What the literature calls them -> bits of weights and activations -> the recipe.
STEPS: dict[str, Callable[[int, int], ptq.QConfigMapping]] = {
    "base PTQ": ptq.recipes.base_ptq,
    "PTQ4ViT": ptq.recipes.ptq4vit,
    "balance behind norms (RepQ-ViT's idea)": lambda w, a: ptq.recipes.ptq4vit(w, a).with_transforms(norms=1.0),
    "balance in attention": lambda w, a: ptq.recipes.ptq4vit(w, a).with_transforms(attention=1.0),
    "rounding (GPTQ's idea)": lambda w, a: ptq.recipes.ptq4vit(w, a).with_search(rounding="gram"),
    "rotation": lambda w, a: ptq.recipes.ptq4vit(w, a).with_transforms(rotation=0),
    "best": ptq.recipes.best,
}


def runtime_top1(converted: torch.fx.GraphModule, images: Tensor, labels: Tensor) -> float:
    """Export, and return the share of images that ONNX Runtime classifies right."""
    with tempfile.TemporaryDirectory() as folder:
        ptq.export_onnx(converted, Path(folder) / "model.onnx", images[:1])
        session = open_session(Path(folder) / "model.onnx", exact=True)
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: batch.numpy()})[0].argmax(1) for batch in images.split(BATCH)]
    return float((np.concatenate(found) == labels.numpy()).mean())


@torch.inference_mode()
def float_top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the float model classifies right."""
    found = torch.cat([model(batch).argmax(1) for batch in track(images.split(BATCH), "float")])
    return float((found == labels).float().mean())


def recipe(bits: int, weights: Literal["channel", "group"], *, hessian: bool, softmax: bool, gelu: bool):
    """Return the recipe `ptq4vit` with some of its parts switched off."""
    mapping = ptq.recipes.ptq4vit(bits, bits, weights)
    qconfig = mapping.global_qconfig
    assert qconfig is not None
    qconfig = replace(qconfig, softmax=qconfig.softmax if softmax else None, gelu=qconfig.gelu if gelu else None)
    return mapping.set_global(qconfig).with_search(metric="hessian" if hessian else "cosine")


@app.command()
def paper(
    model: str,
    fixtures: Annotated[Path, typer.Option(help="folder with trained models and images")],
    images: Annotated[int, typer.Option(help="validation images")] = 1000,
    calibration_images: int = 32,
    bits: Annotated[list[int] | None, typer.Option(help="of weights and activations, repeatable")] = None,
    weights: Annotated[Literal["channel", "group"], typer.Option(help="granularity; the paper's: group")] = "group",
) -> None:
    """Print one Markdown row per combination of the paper's parts.

    Products are calibrated independently of each other, so two calibrations, with all twins and with none, hold
    the scales of every combination of twins.
    """
    sys.path.insert(0, str(fixtures))
    import fixtures as source

    network, size = source.load_model(model)
    calibration_set = source.load_images("calib", calibration_images, size)[0]
    pixels, labels = source.load_images("val", images, size)
    widths = bits or [8, 6, 4]
    scores = {}
    for width, hessian in itertools.product(widths, (False, True)):
        calibrations = {}
        for twins in (False, True):
            mapping = recipe(width, weights, hessian=hessian, softmax=twins, gelu=twins)
            prepared = ptq.prepare_fx(network, mapping, calibration_set[:1])
            calibrations[twins] = ptq.calibrate(prepared, calibration_set)
        for softmax, gelu in itertools.product((False, True), repeat=2):
            mapping = recipe(width, weights, hessian=hessian, softmax=softmax, gelu=gelu)
            prepared = ptq.prepare_fx(network, mapping, calibration_set[:1])
            on = {"softmax": softmax, "gelu": gelu, "gelu_tanh": gelu}
            params = {
                f"{op.name}:{operand}": calibrations[on.get(op.lhs_source or "", False)].params[f"{op.name}:{operand}"]
                for op in prepared.plan.ops
                for operand in ("lhs", "rhs")
            }
            ptq.load_calibration(prepared, ptq.Calibration(plan_of(prepared), params))
            score = runtime_top1(ptq.convert_fx(prepared), pixels, labels)
            scores[(hessian, softmax, gelu), width] = score
            print(f"W{width}A{width} hessian={hessian} softmax={softmax} gelu={gelu}: {score:.2%}", flush=True)
    print(f"\n{model}: float {float_top1(network, pixels, labels):.2%}, {images} images of `val`, {weights} weights\n")
    print("| Hessian | softmax twin | GELU twin | " + " | ".join(f"W{b}A{b}" for b in widths) + " |")
    print("|---|---|---|" + "---|" * len(widths))
    for on_off in itertools.product((False, True), repeat=3):
        marks = " | ".join("yes" if on else "" for on in on_off)
        print(f"| {marks} | " + " | ".join(f"{scores[on_off, b]:.2%}" for b in widths) + " |")


@app.command()
def steps(
    model: str,
    fixtures: Annotated[Path, typer.Option(help="folder with trained models and images")],
    bits: Annotated[list[str], typer.Option(help="W8A8, W4A8, ..., repeatable")] = ["8", "6", "W4A8", "4"],  # noqa: B006
    step: Annotated[list[str] | None, typer.Option(help="a row's beginning, repeatable (default: all)")] = None,
    first: Annotated[list[int], typer.Option(help="number of the first calibration image, repeatable")] = [0],  # noqa: B006
    calibration_images: int = 32,
    images: Annotated[int, typer.Option(help="validation images")] = 1000,
    file: Annotated[bool, typer.Option("--file", help="measure the exported file, in ONNX Runtime")] = False,
    scales: Annotated[Path, typer.Option(help="folder of finished scales")] = Path("out/scales"),
) -> None:
    """Print one Markdown row per step and width: top-1, share of images of the float model's class, divergence."""
    source = open_source(model, fixtures, images, scales)
    recipes = {name: recipe for name, recipe in STEPS.items() if not step or name.startswith(tuple(step))}
    print_table(source, recipes, bits, first, calibration_images, file=file)


if __name__ == "__main__":
    app()
