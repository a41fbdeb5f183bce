"""The paper's ablation: the Hessian-guided metric, the softmax twin and the GELU twin, each on and off.

    python examples/ablation.py deit_tiny_p8_64 --fixtures ../shared/fixtures

Everything else is the recipe `ptq4vit`; without the Hessian-guided metric the scales are chosen by cosine
similarity, and without a twin its operand gets one uniform scale. The fixtures folder is described in accuracy.py.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import ptq4vit_fx as ptq

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BATCH = 25


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right classes."""
    return (
        torch.cat([model(b).argmax(1) == y for b, y in zip(images.split(BATCH), labels.split(BATCH), strict=True)])
        .float()
        .mean()
        .item()
    )


def recipe(bits: int, *, hessian: bool, softmax: bool, gelu: bool) -> ptq.QConfigMapping:
    """Return the recipe `ptq4vit` with some of its parts switched off."""
    mapping = ptq.recipes.ptq4vit(bits, bits)
    qconfig = mapping.global_qconfig
    assert qconfig is not None
    qconfig = replace(qconfig, softmax=qconfig.softmax if softmax else None, gelu=qconfig.gelu if gelu else None)
    return mapping.set_global(qconfig).with_search(metric="hessian" if hessian else "cosine")


@app.command(help=__doc__)
def main(
    model: str,
    fixtures: Annotated[Path, typer.Option(help="folder with trained models and images")],
    images: Annotated[int, typer.Option(help="validation images")] = 1000,
    calibration_images: int = 32,
    bits: Annotated[list[int] | None, typer.Option(help="of weights and activations, repeatable")] = None,
    loss: str = "pseudo_label",
) -> None:
    """Print one Markdown row per combination."""
    sys.path.insert(0, str(fixtures))
    import fixtures as source

    network, size = source.load_model(model)
    calibration = source.load_images("calib", calibration_images, size)[0]
    pixels, labels = source.load_images("val", images, size)
    widths = bits or [8, 6, 4]
    print(f"{model}: float {top1(network, pixels, labels):.2%}, {images} images of `val`\n")
    print("| Hessian | softmax twin | GELU twin | " + " | ".join(f"W{b}A{b}" for b in widths) + " |")
    print("|---|---|---|" + "---|" * len(widths))
    for hessian, softmax, gelu in itertools.product((False, True), repeat=3):
        scores = []
        for width in widths:
            mapping = recipe(width, hessian=hessian, softmax=softmax, gelu=gelu)
            converted = ptq.quantize(network, calibration, qconfig_mapping=mapping, loss=loss, progress=False)
            scores.append(f"{top1(converted, pixels, labels):.2%}")
        marks = " | ".join("yes" if on else "" for on in (hessian, softmax, gelu))
        print(f"| {marks} | " + " | ".join(scores) + " |", flush=True)


if __name__ == "__main__":
    app()
