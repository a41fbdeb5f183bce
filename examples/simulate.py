"""Top-1 for several bit widths and several choices of the 32 calibration images.

    python examples/simulate.py vit_s14 --fixtures ../shared/fixtures --bits 8 --bits 6 --first 0 --first 32 --first 64

Every product runs in float on fake-quantized operands, as the paper simulates it. `--file` measures the exported file
in ONNX Runtime instead, which is the same but for the last bit of LayerNorm, softmax and GELU, and three times as fast.
Finished scales are kept in --scales and reused. The fixtures folder is described in accuracy.py.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.calibrating.losses import DEFAULT_LOSS
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.pipeline import CONVERSION

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BATCH = 25
#: So many images are in memory at a time.
LOADED = 500


@torch.inference_mode()
def top1(model: Callable[[Tensor], Tensor], loaded: Iterator[tuple[Tensor, Tensor]], what: str) -> float:
    """Return the share of images that the model classifies right, and print it as it comes."""
    hits = seen = 0
    for images, labels in loaded:
        found = torch.cat([model(batch).argmax(1) for batch in track(images.split(BATCH), what, transient=True)])
        hits, seen = hits + int((found == labels).sum()), seen + len(labels)
        print(f"{what}: {hits / seen:.2%} of {seen}", flush=True)
    return hits / seen


def simulation(prepared: GraphModule) -> GraphModule:
    """Return the calibrated model with its operands fake-quantized and its products in float."""
    return CONVERSION.until("insert_quantizers").run(copy.deepcopy(prepared))


def exported(prepared: GraphModule, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the calibrated model as ONNX Runtime runs its file."""
    with tempfile.TemporaryDirectory() as folder:
        ptq.export_onnx(ptq.convert_fx(prepared), Path(folder) / "model.onnx", example)
        session = open_session(Path(folder) / "model.onnx", exact=True)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


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
    file: Annotated[bool, typer.Option("--file", help="measure the exported file, in ONNX Runtime")] = False,
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
            ptq.calibrate(prepared, calibration_images, loss=loss, checkpoint=kept)
            measured = exported(prepared, calibration_images[:1]) if file else simulation(prepared)
            loaded = (
                source.load_images("val", min(LOADED, images - number), size, number)
                for number in range(0, images, LOADED)
            )
            scores.append(top1(measured, loaded, f"W{width}A{width}, images from {start}"))
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        cells = " | ".join(f"{score:.2%}" for score in scores)
        rows.append(f"| {name} | W{width}A{width} | {cells} | {statistics.mean(scores):.2%} | {spread:.2%} |")
    print(f"\n{model}, {images} images of `val`, {'ONNX Runtime' if file else 'simulated'}\n")
    print(
        "| recipe | bits | " + " | ".join(f"images from {start}" for start in first) + " | mean | standard deviation |"
    )
    print("|---|---|" + "---|" * (len(first) + 2))
    print("\n".join(rows))


if __name__ == "__main__":
    app()
