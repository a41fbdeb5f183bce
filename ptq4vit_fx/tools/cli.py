"""The command line: quantize, eval, inspect, demo, coverage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.console import Console

from ptq4vit_fx.errors import PTQError, PTQWarning, failure, printable
from ptq4vit_fx.files import check_writable

if TYPE_CHECKING:
    from ptq4vit_fx.qconfig import QConfigMapping

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, markup=False, emoji=False)


def _say(text: object, *, highlight: bool = True) -> None:
    """Print lines in which names out of files stand: a terminal obeys nothing of them, and any encoding takes them."""
    shown = printable(str(text), keep="\n").encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(shown, highlight=highlight)


@contextmanager
def _readable_errors(checkpoint: Path | None = None) -> Iterator[None]:
    """Print warnings of this package as lines and its errors as one sentence; leave with exit code 1, or 130."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=PTQWarning)
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        try:
            yield
        except PTQError as error:
            _say(f"error: {error}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            kept = checkpoint is not None and checkpoint.exists()
            _say(
                f"interrupted: finished products are in {checkpoint}, the same command goes on from there"
                if kept
                else "interrupted: nothing was written",
            )
            raise typer.Exit(130) from interrupt


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="timm model name")],
    data: Annotated[Path, typer.Option(help="folder of images, nested or flat; labels are not used")],
    out: Annotated[str, typer.Option(metavar="PATH", help="ONNX file to write")],
    weights: Annotated[Path | None, typer.Option(help="local safetensors or pth file (default: timm's hub)")] = None,
    weights_entry: Annotated[
        str | None, typer.Option(help="entry of that file to take, as state_dict (default: the averaged one, or any)")
    ] = None,
    model_arg: Annotated[list[str] | None, typer.Option(help="key=value for timm.create_model, repeatable")] = None,
    recipe: Annotated[
        str, typer.Option(help="best, ptq4vit (the paper's), tensorrt (for that target) or base")
    ] = "best",
    twins: Annotated[
        str,
        typer.Option(
            help="of best and ptq4vit: exact, wide, uniform, or auto: uniform where that adds little and saves time"
        ),
    ] = "exact",
    w_bits: Annotated[int, typer.Option(help="bits of weights, 2 to 8")] = 8,
    a_bits: Annotated[int, typer.Option(help="bits of activations, 2 to 8")] = 8,
    images: Annotated[int, typer.Option(min=1, help="calibration images")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="images per forward and backward")] = 8,
    target: Annotated[
        str, typer.Option(help="onnxruntime, onnxruntime-avx2, onnxruntime-arm, openvino, tensorrt or generic")
    ] = "onnxruntime",
    opset: Annotated[int, typer.Option(help="ONNX operator set, 17 or newer")] = 20,
    batch: Annotated[int | None, typer.Option(min=1, help="images per run of the file (default: any number)")] = None,
    seed: Annotated[int, typer.Option(help="seed of the calibration")] = 0,
    loss: Annotated[str, typer.Option(help="its gradient weighs the search: pseudo_label or fisher")] = "pseudo_label",
    checkpoint: Annotated[Path | None, typer.Option(help="keep finished products here, and go on from it")] = None,
    memory_limit: Annotated[
        float | None, typer.Option(help="GiB that calibration may take (default: half of what is free)")
    ] = None,
) -> None:
    """Quantize a timm vision transformer, write it to ONNX, and verify it in ONNX Runtime."""
    with _readable_errors(checkpoint):
        import timm.data
        import torch

        import ptq4vit_fx
        from ptq4vit_fx.export.onnx_export import check_target
        from ptq4vit_fx.passes.graph.contract import calibration_of, plan_of
        from ptq4vit_fx.tools.models import create_model, data_config, list_images, load_images, said_of_skipped

        mapping = _mapping(recipe, twins, w_bits, a_bits)
        # Before the download and the minutes, not after:
        check_writable(out, "quantize --out")
        if checkpoint is not None:
            check_writable(checkpoint, "quantize --checkpoint")
        check_target(target, opset, batch)
        if target == "tensorrt" and recipe in ("best", "ptq4vit"):
            expected, do = "tensorrt or base with the target tensorrt", "add --recipe tensorrt"
            raise failure("quantize", "--recipe", expected=expected, got=repr(recipe), do=do)
        folder = list_images(data, limit=images)
        said: list[str] = []
        network = create_model(model, weights, model_arg or [], entry=weights_entry, said=said)
        for line in said:
            _say(line)
        preprocessing = data_config(network)
        skipped: list[str] = []
        channels = preprocessing["input_size"][0]
        if channels == 1:
            mean, std = (preprocessing[key][0] for key in ("mean", "std"))
            _say(f"images are read as gray, mean {mean:g} and std {std:g}: the averages of the three channels")
        with console.status("read images"):
            pixels = load_images(folder, timm.data.create_transform(**preprocessing), images, skipped, channels)
        if skipped:
            _say(said_of_skipped(skipped))
        prepared = ptq4vit_fx.prepare_fx(network, mapping, pixels[:1])
        batches = list(torch.split(pixels, batch_size))
        limit = None if memory_limit is None else round(memory_limit * 2**30)
        ptq4vit_fx.calibrate(prepared, batches, seed=seed, loss=loss, checkpoint=checkpoint, memory_limit=limit)
        if twins == "auto":
            prepared, choice = ptq4vit_fx.choose_twins(prepared, batches, seed=seed, loss=loss, memory_limit=limit)
            _say(str(choice))
        origin = {"model": model, "recipe": recipe, "preprocessing": preprocessing}
        calibration = calibration_of(prepared)
        assert calibration is not None
        calibration = replace(calibration, provenance=calibration.provenance | origin)
        ptq4vit_fx.load_calibration(prepared, calibration)
        converted = ptq4vit_fx.convert_fx(prepared)
        with console.status("export to ONNX"):
            exported = ptq4vit_fx.export_onnx(converted, out, pixels[:1], target=target, opset=opset, batch=batch)
        with console.status("verify in ONNX Runtime"):
            # A file of a fixed batch takes no other: repeat the first images until the last batch is full.
            shown = pixels if batch is None else pixels[torch.arange(-(-len(pixels) // batch) * batch) % len(pixels)]
            verified = ptq4vit_fx.verify_onnx(out, converted, list(torch.split(shown, batch or batch_size)))
        plan = plan_of(prepared)
        _say(
            f"{model}: {len(plan.ops)} products, {len(plan.quantizers)} sites, W{w_bits}A{a_bits}, "
            f"{len(pixels)} images ({len(skipped)} skipped), "
            f"calibrated in {calibration.provenance['seconds']:.1f} s",
        )
        _say(f"{exported}\n{verified}")


def _mapping(recipe: str, twins: str, w_bits: int, a_bits: int) -> QConfigMapping:
    """Return the recipe of that name; raises PTQError on a name that does not exist or does not go with the twins."""
    from ptq4vit_fx import recipes

    with_twins = {"best": recipes.best, "ptq4vit": recipes.ptq4vit}
    without = {"tensorrt": recipes.tensorrt, "base": recipes.base_ptq}
    if recipe not in {*with_twins, *without}:
        expected = "best, ptq4vit, tensorrt or base"
        raise failure("quantize", "--recipe", expected=expected, got=repr(recipe), do="choose one")
    kinds = ("exact", "wide", "uniform", "auto") if recipe in with_twins else ("exact",)
    if twins not in kinds:
        expected = f"{' or '.join(kinds)} with the recipe {recipe}"
        raise failure("quantize", "--twins", expected=expected, got=repr(twins), do="choose one")
    if recipe in without:
        return without[recipe](w_bits, a_bits)
    searched = "exact" if twins == "auto" else cast("Literal['exact', 'wide', 'uniform']", twins)
    return with_twins[recipe](w_bits, a_bits, twins=searched)


@app.command(name="eval")
def evaluate(
    file: Annotated[Path, typer.Argument(help="ONNX file written by quantize")],
    data: Annotated[Path, typer.Option(help="folder with one sub-folder per class, in the order of the classes")],
    model: Annotated[
        str | None, typer.Option(help="timm model whose preprocessing to use (default: the file's)")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Print the top-1 accuracy of an ONNX file in ONNX Runtime."""
    with _readable_errors():
        from ptq4vit_fx.tools.evaluation import evaluate_file

        _say(str(evaluate_file(file, data, model, batch_size, console)))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="ONNX file written by quantize")],
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Print sites, bits, scales and thresholds, what ONNX Runtime runs as integers or in float, and on which CPU."""
    with _readable_errors():
        from ptq4vit_fx.export.proof.inspection import inspect_file

        report = inspect_file(file)
        _say(report.to_json() if as_json else str(report), highlight=not as_json)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder for the ONNX files and the picture")] = Path("out")) -> None:
    """Quantize the embedded digits ViT at 8, 6 and 4 bits with both recipes; needs no network."""
    with _readable_errors():
        from ptq4vit_fx.tools.demo import run_demo

        run_demo(out, console)


@app.command()
def coverage(
    family: Annotated[list[str] | None, typer.Option(help="family to try, repeatable (default: all)")] = None,
    out: Annotated[Path, typer.Option(help="folder for coverage.md and coverage.json")] = Path("out"),
) -> None:
    """Take a model of every family, random weights, through tracing, quantization, export and ONNX Runtime."""
    with _readable_errors():
        from ptq4vit_fx.tools.coverage import run_coverage
        from ptq4vit_fx.tools.families import FAMILIES, find_family

        families = [find_family(name) for name in family] if family else FAMILIES
        rows = run_coverage(families, out, _say)
    if any(row.problem for row in rows):
        raise typer.Exit(1)
