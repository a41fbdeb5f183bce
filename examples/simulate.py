"""What recipes keep of a float model, for several bit widths and several choices of the 32 calibration images.

    python examples/simulate.py vit_s14 --fixtures ../shared/fixtures --bits W8A8 --bits W4A8 --first 0 --first 32

Top-1 by the labels, the share of images that get the float model's class, and the Kullback-Leibler divergence from it.
Every product runs in float on fake-quantized operands, as the paper simulates it. `--file` measures the exported file
in ONNX Runtime instead: the same but for the last bit of LayerNorm, softmax and GELU, and three times as fast.
Finished scales and the float model's answers are kept in --scales and reused. The fixtures folder is described in
accuracy.py.
"""

from __future__ import annotations

import copy
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.pipeline import CONVERSION

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BATCH = 25
#: So many images are in memory at a time.
LOADED = 500


@dataclass(frozen=True)
class Score:
    """Of a quantized model on labelled images, shares from 0 to 1: right, and of one class with the float model.

    divergence: Kullback-Leibler, in nats, from the float model's probabilities, mean over the images.
    """

    right: float
    agreement: float
    divergence: float


@dataclass(frozen=True)
class Source:
    """A trained model, and images behind `load_images(split, count, size, first)`; described in accuracy.py."""

    name: str
    network: nn.Module
    size: int
    load: Callable[..., tuple[Tensor, Tensor]]
    #: Of `val`, how many; answers and scales are kept in this folder.
    images: int
    kept: Path

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of `val`, LOADED at a time."""
        for start in range(0, self.images, LOADED):
            yield self.load("val", min(LOADED, self.images - start), self.size, start)

    def calibration_images(self, first: int, count: int = 32) -> Tensor:
        """Return `count` images of `calib` from `first` on."""
        return self.load("calib", count, self.size, first)[0]


def open_source(name: str, fixtures: Path, images: int, kept: Path) -> Source:
    """Return the model of that name in the fixtures folder, with its images."""
    sys.path.insert(0, str(fixtures))
    import fixtures as source

    kept.mkdir(parents=True, exist_ok=True)
    network, size = source.load_model(name)
    return Source(name, network, size, source.load_images, images, kept)


@torch.inference_mode()
def answers(model: Callable[[Tensor], Tensor], source: Source, what: str) -> Tensor:
    """Return the logits of a model on the validation images, float32 (images, classes)."""
    found = [
        torch.cat(
            [model(batch) for batch in track(images.split(BATCH), f"{what}, from {number * LOADED}", transient=True)]
        )
        for number, (images, _) in enumerate(source.validation())
    ]
    return torch.cat(found)


def float_answers(source: Source) -> tuple[Tensor, Tensor]:
    """Return the float model's logits and the labels; they are computed once and kept."""
    path = source.kept / f"{source.name}_float_{source.images}.safetensors"
    if not path.exists():
        labels = torch.cat([labels for _, labels in source.validation()])
        save_file({"logits": answers(source.network, source, "float"), "labels": labels}, path)
    found = load_file(path)
    return found["logits"], found["labels"]


def score(found: Tensor, source: Source) -> Score:
    """Compare logits, float32 (images, classes), with the labels and with the float model's."""
    reference, labels = float_answers(source)
    own, theirs = found.log_softmax(1), reference.log_softmax(1)
    divergence = (theirs.exp() * (theirs - own)).sum(1)
    top, same = found.argmax(1), reference.argmax(1)
    return Score(float((top == labels).float().mean()), float((top == same).float().mean()), float(divergence.mean()))


def simulation(prepared: GraphModule) -> GraphModule:
    """Return the calibrated model with its operands fake-quantized and its products in float."""
    return CONVERSION.until("round_weights").run(copy.deepcopy(prepared))


def exported(prepared: GraphModule, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the calibrated model as ONNX Runtime runs its file."""
    with tempfile.TemporaryDirectory() as folder:
        ptq.export_onnx(ptq.convert_fx(prepared), Path(folder) / "model.onnx", example)
        session = open_session(Path(folder) / "model.onnx", exact=True)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def measure(
    source: Source, mapping: ptq.QConfigMapping, images: Tensor, key: str, *, file: bool, **calibrate: Any
) -> Score:
    """Calibrate on these images, or take the scales that are kept under this key, and score on `val`."""
    prepared = ptq.prepare_fx(source.network, mapping, images[:1])
    ptq.calibrate(prepared, images, checkpoint=source.kept / f"{source.name}_{key}.safetensors", **calibrate)
    measured = exported(prepared, images[:1]) if file else simulation(prepared)
    found = score(answers(measured, source, key), source)
    print(f"{key}: {found}", flush=True)
    return found


def widths(text: str) -> tuple[int, int]:
    """Return the bits of weights and activations of `W4A8`, or of `8` for both."""
    match = re.fullmatch(r"[Ww](\d)[Aa](\d)|(\d)", text)
    if match is None:
        raise typer.BadParameter(f"expected bits as W8A8 or 8, got {text!r}")
    return int(match[1] or match[3]), int(match[2] or match[3])


def row(scores: list[Score]) -> str:
    """Return mean and, of several, standard deviation of each figure as cells of a Markdown table."""
    top, same, far = ([getattr(s, field) for s in scores] for field in ("right", "agreement", "divergence"))

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    return (
        f"{' / '.join(f'{value:.2%}' for value in top)} | {statistics.mean(top):.2%} ± {spread(top):.2%} "
        f"| {statistics.mean(same):.2%} | {statistics.mean(far):.4f} ± {spread(far):.4f}"
    )


def print_table(
    source: Source,
    recipes: Mapping[str, Callable[[int, int], ptq.QConfigMapping]],
    bits: list[str],
    first: list[int],
    calibration_images: int,
    *,
    file: bool,
    **calibrate: Any,
) -> None:
    """Measure every recipe at every width, from every first image on, and print a Markdown row each.

    recipes: name -> bits of weights and activations -> the recipe; scales are kept under the name up to its brackets.
    """
    rows = []
    for name, recipe_of in recipes.items():
        for weights, activations in map(widths, bits):
            width, scores = f"W{weights}A{activations}", []
            for start in first:
                key = f"{name.partition(' (')[0].replace(', ', '_')}_{width}_{calibration_images}_{start}"
                pixels = source.calibration_images(start, calibration_images)
                mapping = recipe_of(weights, activations)
                scores.append(measure(source, mapping, pixels, key, file=file, **calibrate))
            rows.append(f"| {name} | {width} | {row(scores)} |")
    top = score(float_answers(source)[0], source).right
    where = "ONNX Runtime" if file else "simulated"
    print(f"\n{source.name}, {source.images} images of `val`, float {top:.2%}, {where}, ", end="")
    print(f"{calibration_images} calibration images from {', '.join(map(str, first))}\n")
    print("| recipe | bits | top-1 | mean | agreement | KL |\n|---|---|---|---|---|---|")
    print("\n".join(rows))


@app.command(help=__doc__)
def main(
    model: str,
    fixtures: Annotated[Path, typer.Option(help="folder with trained models and images")],
    bits: Annotated[list[str], typer.Option(help="W8A8, W4A8, ..., repeatable")] = ["8", "6", "4"],  # noqa: B006
    first: Annotated[list[int], typer.Option(help="number of the first of the 32 images, repeatable")] = [0],  # noqa: B006
    recipe: Annotated[list[str], typer.Option(help="of ptq4vit_fx.recipes, repeatable")] = ["best"],  # noqa: B006
    twins: Annotated[str, typer.Option(help="of the recipes that have them: exact, wide or uniform")] = "exact",
    loss: Annotated[str | None, typer.Option(help="whose gradient weighs the search (default: the recipe's)")] = None,
    metric: Annotated[str | None, typer.Option(help="of the search (default: the recipe's)")] = None,
    calibration_images: int = 32,
    images: Annotated[int, typer.Option(help="validation images")] = 5000,
    file: Annotated[bool, typer.Option("--file", help="measure the exported file, in ONNX Runtime")] = False,
    scales: Annotated[Path, typer.Option(help="folder of finished scales")] = Path("out/scales"),
) -> None:
    """Print one Markdown row per recipe and bit width."""
    source = open_source(model, fixtures, images, scales)
    changed = {"twins": twins} if twins != "exact" else {}
    variant = [*changed.values(), *([metric] if metric else []), *([loss] if loss else [])]

    def recipe_of(name: str, weights: int, activations: int) -> ptq.QConfigMapping:
        mapping: ptq.QConfigMapping = getattr(ptq.recipes, name)(weights, activations, **changed)
        return mapping if metric is None else mapping.with_search(metric=metric)

    recipes = {", ".join([name, *variant]): partial(recipe_of, name) for name in recipe}
    print_table(source, recipes, bits, first, calibration_images, file=file, loss=loss)


if __name__ == "__main__":
    app()
