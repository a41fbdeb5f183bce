"""Top-1 of the simulation for several bit widths and several choices of the 32 calibration images.

    python examples/simulate.py vit_s14 --fixtures ../shared/fixtures --bits 8 --bits 6 --first 0 --first 32 --first 64

Every product runs in float on fake-quantized operands, as the paper simulates it; examples/accuracy.py measures the
exported file. Finished scales are kept in --scales and reused. The fixtures folder is described in accuracy.py.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

import ptq4vit_fx as ptq
from ptq4vit_fx.losses import DEFAULT_LOSS
from ptq4vit_fx.passes.insert_quantizers import insert_quantizers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BATCH = 25
#: So many images are in memory at a time.
LOADED = 500


@torch.inference_mode()
def top1(model: nn.Module, loaded: Iterator[tuple[Tensor, Tensor]], what: str) -> float:
    """Return the share of images that the model classifies right, and print it as it comes."""
    hits = seen = 0
    for images, labels in loaded:
        found = torch.cat([model(batch).argmax(1) for batch in track(images.split(BATCH), what, transient=True)])
        hits, seen = hits + int((found == labels).sum()), seen + len(labels)
        print(f"{what}: {hits / seen:.2%} of {seen}", flush=True)
    return hits / seen


@app.command(help=__doc__)
def main(
    model: str,
    fixtures: Annotated[Path, typer.Option(help="folder with trained models and images")],
    bits: Annotated[list[int], typer.Option(help="of weights and activations, repeatable")] = [8, 6, 4],  # noqa: B006
    first: Annotated[list[int], typer.Option(help="number of the first of the 32 images, repeatable")] = [0],  # noqa: B006
    recipe: str = "ptq4vit",
    twins: Annotated[str, typer.Option(help="of the recipe ptq4vit: exact, wide or uniform")] = "exact",
    loss: str = DEFAULT_LOSS,
    metric: Annotated[str | None, typer.Option(help="of the search (default: the recipe's)")] = None,
    images: Annotated[int, typer.Option(help="validation images")] = 5000,
    scales: Annotated[Path, typer.Option(help="folder of finished scales")] = Path("out/scales"),
) -> None:
    """Print one Markdown row per bit width."""
    sys.path.insert(0, str(fixtures))
    import fixtures as source

    network, size = source.load_model(model)
    scales.mkdir(parents=True, exist_ok=True)
    rows = []
    changed = {"twins": twins} if twins != "exact" else {}
    name = ", ".join(
        [recipe, *changed.values(), *([metric] if metric else []), *([loss] if loss != DEFAULT_LOSS else [])]
    )
    for width in bits:
        scores = []
        for start in first:
            calibration_images = source.load_images("calib", 32, size, start)[0]
            mapping = getattr(ptq.recipes, recipe)(width, width, **changed)
            mapping = mapping if metric is None else mapping.with_search(metric=metric)
            prepared = ptq.prepare_fx(network, mapping, calibration_images[:1])
            kept = scales / f"{model}_{name.replace(', ', '_')}_{width}_{start}.safetensors"
            calibration = ptq.calibrate(prepared, calibration_images, loss=loss, checkpoint=kept)
            simulated = copy.deepcopy(prepared)
            insert_quantizers(simulated, calibration.plan.quantizers, calibration.params)
            loaded = (
                source.load_images("val", min(LOADED, images - number), size, number)
                for number in range(0, images, LOADED)
            )
            scores.append(top1(simulated, loaded, f"W{width}A{width}, images from {start}"))
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        cells = " | ".join(f"{score:.2%}" for score in scores)
        rows.append(f"| {name} | W{width}A{width} | {cells} | {statistics.mean(scores):.2%} | {spread:.2%} |")
    print(f"\n{model}, {images} images of `val`\n")
    print(
        "| recipe | bits | " + " | ".join(f"images from {start}" for start in first) + " | mean | standard deviation |"
    )
    print("|---|---|" + "---|" * (len(first) + 2))
    print("\n".join(rows))


if __name__ == "__main__":
    app()
