"""The command line: quantize, eval, verify, bench, inspect, report, why, timings, targets, demo, coverage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ptq4vit_fx.errors import failure
from ptq4vit_fx.tools import options, tuning_commands
from ptq4vit_fx.tools.commands import Quiet, bench, coverage, demo, report, targets, verify
from ptq4vit_fx.tools.terminal import EXIT_CODES, POOR, complaints, readable_errors, say, say_json, showing, typed

if TYPE_CHECKING:
    from ptq4vit_fx.export.proof.against_float import Kind

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


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
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="timm name, hf-hub:ORG/NAME, local-dir:FOLDER (timm's own); ORG/NAME or ./FOLDER (Hugging Face); "
            "torchvision:NAME; file.py:Class or package.module:function, which runs that code"
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="images: folder, list (.txt), .npz, .npy, .zip, .tar, .parquet; labels unused")
    ],
    out: Annotated[str, typer.Option(metavar="PATH", help="ONNX file to write")],
    weights: Annotated[
        Path | None,
        typer.Option(help="its checkpoint: safetensors or pth, shards, a folder (default: the model's own)"),
    ] = None,
    weights_entry: Annotated[
        str | None, typer.Option(help="entry of that file to take, as state_dict (default: the averaged one, or any)")
    ] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--no-ema", help="take averaged weights of that file, or others (default: any)")
    ] = None,
    model_arg: Annotated[list[str] | None, typer.Option(help="key=value for what makes it, repeatable")] = None,
    recipe: Annotated[
        str, typer.Option(help="best, ptq4vit (the paper's), tensorrt (for that target) or base")
    ] = "best",
    twins: Annotated[
        str | None,
        typer.Option(
            help="of best and ptq4vit: exact, wide, uniform, or auto (the default of best): uniform where that costs "
            "next to nothing on images that calibration has not seen"
        ),
    ] = None,
    w_bits: Annotated[int, typer.Option(help="bits of weights, 2 to 8")] = 8,
    a_bits: Annotated[int, typer.Option(help="bits of activations, 2 to 8; 32: weights alone are quantized")] = 8,
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
    loss: Annotated[
        str | None,
        typer.Option(help="its gradient weighs the search: pseudo_label, fisher, projection (default: of the recipe)"),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="keep finished products here, and go on from it")] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER", help="that calibration may take: 8, 8GiB, 500MiB (default: half of what is free)"
        ),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="module, product or pattern that stays float, repeatable")
    ] = None,
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
    quiet: Quiet = False,
    as_json: options.AsJson = False,
    layout: Annotated[
        str, typer.Option(help="file, or huggingface: --out is a folder that optimum and transformers.js open")
    ] = "file",
    uint8_input: Annotated[
        str | None, typer.Option(help="nhwc or nchw: the file takes uint8 images and scales them itself")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="text file, one class name per line, for the file")] = None,
    agreement: options.Agreement = None,
    minimize: options.Minimize = "time",
    timings: options.TimingsFile = None,
    advise: options.Advise = False,
    settings: options.Settings = None,
    weights_granularity: options.WeightsGranularity = None,
    device: options.Device = "cpu",
    sequential: options.Sequential = False,
    scheduler: options.Scheduler = None,
    input_name: options.InputName = None,
    output_name: options.OutputName = None,
    config: options.Config = None,
    print_config: options.PrintConfig = False,
    plan: options.Plan = False,
    report: options.Report = None,
    img_size: options.ImgSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
) -> None:
    """Quantize a vision transformer, write it to ONNX, and compare it with the float model."""
    if advise:
        tuning_commands.timings(model, model_arg, target, batch or 1, advise=True, as_json=as_json)
        return
    shown = not (quiet or as_json)
    with readable_errors(checkpoint) as heard:
        from ptq4vit_fx.tools.config_file import as_toml

        repeat = as_toml(quantize, context.params) if verbose or print_config else ""
        if print_config:
            say(repeat, highlight=False)
            return
        phases = showing(shown)
        from ptq4vit_fx.tools.image_options import image_options
        from ptq4vit_fx.tools.layouts import Destination
        from ptq4vit_fx.tools.mappings import mapping_of
        from ptq4vit_fx.tools.quantizing import plan_folder, quantize_folder
        from ptq4vit_fx.tools.request import Request, batch_of_calibration, gibibytes
        from ptq4vit_fx.tools.tuned_request import default_twins

        twins = twins or default_twins(recipe, agreement, sequential=sequential)

        request = Request(
            model=model,
            data=data,
            destination=Destination(
                out, layout, uint8_input, labels, tuple(input_name or ()), tuple(output_name or ())
            ),
            mapping=mapping_of(recipe, twins, w_bits, a_bits, weights_granularity, settings or []),
            weights=weights,
            weights_entry=weights_entry,
            ema=ema,
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
            agreement=agreement,
            minimize=minimize,
            timings=timings,
            device=device,
            sequential=sequential,
            scheduler=scheduler,
            settings=tuple(settings or ()),
            report=report,
            command=typed(context),
            image_options=image_options("quantize", img_size, mean, std, crop_pct, interpolation),
        )
        speak = say if shown else lambda text: None
        if plan:
            planned = plan_folder(request, speak, phases)
            say_json(planned.to_dict()) if as_json else say("\n".join(planned.lines()), highlight=False)
            return
        summary = quantize_folder(request, speak, phases, heard=heard)
        for complaint in summary.complaints():
            say(f"warning: {complaint}", to=complaints)
        if as_json:
            say_json(summary.to_dict())
        speak("\n".join(summary.lines()))
        if verbose:
            speak(f"{summary.in_full()}\n{repeat}")
    if fail_under is not None and not summary.against.ok(fail_under):
        say(f"error: {summary.refusal(fail_under)}", to=complaints)
        raise typer.Exit(POOR)


@app.command(name="eval")
def evaluate(
    file: Annotated[Path, typer.Argument(help="ONNX file written by quantize")],
    data: Annotated[
        Path, typer.Option(help="labelled images: one sub-folder per class, or as for quantize, with labels")
    ],
    model: Annotated[
        str | None, typer.Option(help="model whose preprocessing to use, as for quantize (default: the file's)")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images at a time")] = 16,
    against: options.Against = None,
    weights: options.AgainstWeights = None,
    weights_entry: options.AgainstEntry = None,
    ema: options.AgainstEma = None,
    model_arg: options.AgainstArg = None,
    output_kind: Annotated[
        str | None,
        typer.Option(help="classes, or embeddings: each image is looked for among the others (default: file)"),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="list the classes that lose against float")] = False,
    scheduler: options.Scheduler = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the accuracy of an ONNX file in ONNX Runtime, and beside it that of the float model."""
    with readable_errors():
        if against is None and (per_class or model_arg or any(x is not None for x in (weights, weights_entry, ema))):
            expected, do = (
                "--against with --per-class, --weights, --weights-entry, --ema and --model-arg",
                "add --against",
            )
            raise failure("eval", "options", expected=expected, got="none", do=do)
        phases = showing(not as_json)
        from ptq4vit_fx.tools.evaluation import evaluate_file
        from ptq4vit_fx.tools.image_options import image_options
        from ptq4vit_fx.tools.named.model import Asked
        from ptq4vit_fx.tools.schedulers import workers_at
        from ptq4vit_fx.tools.shards import Question

        asked = Asked(against, weights, weights_entry, ema, tuple(model_arg or ())) if against else None
        pixels = image_options("eval", None, mean, std, crop_pct, interpolation)
        question = Question(file, data, model, batch_size, asked, output_kind, pixels)
        with workers_at(scheduler, "eval") as workers:
            found = evaluate_file(question, phases, workers.get("executor"))
        if as_json:
            say_json(found.to_dict())
        else:
            say("\n".join(found.lines(per_class=per_class)))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="ONNX file written by quantize")],
    as_json: options.AsJson = False,
) -> None:
    """Print sites, bits, scales and thresholds, what ONNX Runtime runs as integers or in float, and on which CPU."""
    with readable_errors():
        from ptq4vit_fx.export.proof.inspection import inspect_file

        report = inspect_file(file)
        say(report.to_json() if as_json else str(report), highlight=not as_json)


for command in (verify, bench, report, tuning_commands.why, tuning_commands.timings, targets, demo, coverage):
    app.command()(command)
