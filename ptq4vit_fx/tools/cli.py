"""The command line: quantize, eval, inspect, targets, demo, coverage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ptq4vit_fx.errors import failure
from ptq4vit_fx.tools.terminal import EXIT_CODES, POOR, complaints, console, readable_errors, say, say_json

if TYPE_CHECKING:
    from ptq4vit_fx.export.proof.against_float import Kind
    from ptq4vit_fx.qconfig import QConfigMapping

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Mean = Annotated[
    str | None, typer.Option(help="of values from 0 to 1, as 0.5,0.5,0.5 (default: the model's, or file's)")
]
Std = Annotated[str | None, typer.Option(help="of values from 0 to 1, as --mean")]
CropPct = Annotated[float | None, typer.Option(help="share of the scaled image that is seen")]
Interpolation = Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest, box, hamming or lanczos")]
AsJson = Annotated[bool, typer.Option("--json", help="print everything as JSON, and nothing else")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        say(f"ptq4vit {version('ptq4vit-fx')}", highlight=False)
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Quantize vision transformers, and look at what came of it."""


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="timm model name")],
    data: Annotated[
        Path, typer.Option(help="images: folder, list (.txt), .npz, .npy, .zip, .tar, .parquet; labels unused")
    ],
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
    calibration_batch: Annotated[int, typer.Option(min=1, help="images per forward and backward of calibration")] = 8,
    batch_size: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
    target: Annotated[
        str, typer.Option(help="onnxruntime, onnxruntime-avx2, onnxruntime-arm, openvino, tensorrt or generic")
    ] = "onnxruntime",
    opset: Annotated[int, typer.Option(help="ONNX operator set, 17 or newer")] = 20,
    batch: Annotated[
        int | None,
        typer.Option("--file-batch", "--batch", min=1, help="only number of images that the file takes (default: any)"),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the calibration")] = 0,
    loss: Annotated[str, typer.Option(help="its gradient weighs the search: pseudo_label or fisher")] = "pseudo_label",
    checkpoint: Annotated[Path | None, typer.Option(help="keep finished products here, and go on from it")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="that calibration may take: 8, 8GiB, 500MiB (default: half of what is free)")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="module or product that stays float, repeatable")] = None,
    float_onnx: Annotated[str | None, typer.Option(metavar="PATH", help="write the float model there too")] = None,
    fail_under: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="leave with exit code 3 if less agrees with float: 0.98 of the classes"),
    ] = None,
    output_kind: Annotated[
        str | None, typer.Option(help="what the output is: classes, embeddings or values (default: the model says)")
    ] = None,
    bench: Annotated[bool, typer.Option(help="measure the file beside the float file")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", help="print all that is known of the file")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print warnings and errors alone")] = False,
    as_json: AsJson = False,
    layout: Annotated[
        str, typer.Option(help="file, or huggingface: --out is a folder that optimum and transformers.js open")
    ] = "file",
    uint8_input: Annotated[
        str | None, typer.Option(help="nhwc or nchw: the file takes uint8 images and scales them itself")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="text file, one class name per line, for the file")] = None,
    img_size: Annotated[
        str | None, typer.Option(help="pixels, as 384 or 384x256: height and width (default: the model's)")
    ] = None,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
) -> None:
    """Quantize a timm vision transformer, write it to ONNX, and compare it with the float model."""
    with readable_errors(checkpoint) as heard:
        from ptq4vit_fx.tools.image_options import image_options
        from ptq4vit_fx.tools.layouts import Destination
        from ptq4vit_fx.tools.quantizing import quantize_folder
        from ptq4vit_fx.tools.request import Request, batch_of_calibration, gibibytes

        request = Request(
            model=model,
            data=data,
            destination=Destination(out, layout, uint8_input, labels),
            mapping=_mapping(recipe, twins, w_bits, a_bits),
            weights=weights,
            weights_entry=weights_entry,
            model_args=tuple(model_arg or ()),
            recipe=recipe,
            twins=twins,
            w_bits=w_bits,
            a_bits=a_bits,
            images=images,
            batch_size=batch_of_calibration(calibration_batch, batch_size),
            target=target,
            opset=opset,
            batch=batch,
            seed=seed,
            loss=loss,
            checkpoint=checkpoint,
            memory_limit=gibibytes(memory_limit),
            skip=tuple(skip or ()),
            float_onnx=float_onnx,
            kind=cast("Kind | None", output_kind),
            bench=bench,
            image_options=image_options("quantize", img_size, mean, std, crop_pct, interpolation),
        )
        shown = not (quiet or as_json)
        speak = say if shown else lambda text: None
        drawn = shown and console.is_terminal
        summary = quantize_folder(request, speak, complaints.status, progress=drawn, heard=heard)
        for complaint in summary.complaints():
            say(f"warning: {complaint}", to=complaints)
        if as_json:
            say_json(summary.to_dict())
        speak("\n".join(summary.lines()))
        if verbose:
            speak(summary.in_full())
    if fail_under is not None and not summary.against.ok(fail_under):
        say(f"error: {summary.refusal(fail_under)}", to=complaints)
        raise typer.Exit(POOR)


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
    data: Annotated[
        Path, typer.Option(help="labelled images: one sub-folder per class, or as for quantize, with labels")
    ],
    model: Annotated[
        str | None, typer.Option(help="timm model whose preprocessing to use (default: the file's)")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images at a time")] = 16,
    against: Annotated[
        str | None, typer.Option(metavar="FILE|MODEL", help="float ONNX file or timm model to compare with, in pairs")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="of the model in --against, as for quantize")] = None,
    weights_entry: Annotated[str | None, typer.Option(help="of the model in --against, as for quantize")] = None,
    model_arg: Annotated[list[str] | None, typer.Option(help="of the model in --against, as for quantize")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="list the classes that lose against float")] = False,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    as_json: AsJson = False,
) -> None:
    """Print the accuracy of an ONNX file in ONNX Runtime, and beside it that of the float model."""
    with readable_errors():
        if against is None and (per_class or weights is not None or weights_entry is not None or model_arg):
            expected, do = "--against with --per-class, --weights, --weights-entry and --model-arg", "add --against"
            raise failure("eval", "options", expected=expected, got="none", do=do)
        from ptq4vit_fx.tools.classifiers import float_classifier
        from ptq4vit_fx.tools.evaluation import evaluate_file
        from ptq4vit_fx.tools.image_options import image_options

        reference = float_classifier(against, weights, weights_entry, model_arg or []) if against else None
        pixels = image_options("eval", None, mean, std, crop_pct, interpolation)
        found = evaluate_file(file, data, model, batch_size, complaints, reference, pixels)
        if as_json:
            say_json(found.to_dict())
        else:
            say("\n".join(found.lines(per_class=per_class)))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="ONNX file written by quantize")],
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Print sites, bits, scales and thresholds, what ONNX Runtime runs as integers or in float, and on which CPU."""
    with readable_errors():
        from ptq4vit_fx.export.proof.inspection import inspect_file

        report = inspect_file(file)
        say(report.to_json() if as_json else str(report), highlight=not as_json)


@app.command()
def targets() -> None:
    """Print which flags of quantize belong to which runtime."""
    from ptq4vit_fx.tools.runtimes import as_text

    say(as_text(min(console.width, 100)), highlight=False)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder for the ONNX files and the picture")] = Path("out")) -> None:
    """Quantize the embedded digits ViT at 8, 6 and 4 bits with both recipes; needs no network."""
    with readable_errors():
        from ptq4vit_fx.tools.demo import run_demo

        run_demo(out, console)


@app.command()
def coverage(
    family: Annotated[list[str] | None, typer.Option(help="family to try, repeatable (default: all)")] = None,
    out: Annotated[Path, typer.Option(help="folder for coverage.md and coverage.json")] = Path("out"),
) -> None:
    """Take a model of every family, random weights, through tracing, quantization, export and ONNX Runtime."""
    with readable_errors():
        from ptq4vit_fx.tools.coverage import run_coverage
        from ptq4vit_fx.tools.families import FAMILIES, find_family

        families = [find_family(name) for name in family] if family else FAMILIES
        rows = run_coverage(families, out, say)
    if any(row.problem for row in rows):
        raise typer.Exit(1)
