"""Options that are declared outside of the function of their command: a type each, as typer reads it there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptq4vit_fx.tools.terminal import readable_errors


def _take(context: typer.Context, path: Path | None) -> Path | None:
    """Take what a file says as the defaults of the command line, before anything else of it is read."""
    if path is not None and not context.resilient_parsing:
        with readable_errors():
            from ptq4vit_fx.tools.cli import quantize
            from ptq4vit_fx.tools.config_file import read_config

            context.default_map = {**(context.default_map or {}), **read_config(path, quantize)}
    return path


Config = Annotated[
    Path | None,
    typer.Option(callback=_take, is_eager=True, help="TOML file that holds any of these options by their names"),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="print the file for --config that repeats this run, and do nothing")
]
Plan = Annotated[bool, typer.Option("--plan", help="print what would be done, and do nothing")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=BITS", help="'blocks.*.mlp.fc2=w8a8' or =float, repeatable, the last wins"),
]
WeightsGranularity = Annotated[
    str | None, typer.Option(help="scales of a weight: channel, tensor or group (default: the recipe's)")
]
Device = Annotated[str, typer.Option(help="where the model is calibrated: cpu, cuda, cuda:1 or auto")]
Scheduler = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Dask scheduler whose workers do it: tcp://HOST:8786")
]
Sequential = Annotated[
    bool, typer.Option("--sequential", help="search each product on the values that the quantized ones before give")
]
InputName = Annotated[list[str] | None, typer.Option(help="name of the file's input, repeatable")]
OutputName = Annotated[list[str] | None, typer.Option(help="name of each output of the file, repeatable")]
Agreement = Annotated[
    float | None, typer.Option(help="0.99: keep float's class on so many images, product by product, and no more")
]
Minimize = Annotated[str, typer.Option(help="what --agreement makes small: time, size or bits")]
TimingsFile = Annotated[Path | None, typer.Option(help="of `ptq4vit timings` (default: products are timed here)")]
Advise = Annotated[bool, typer.Option("--advise", help="print what int8 would save here, and write nothing")]
Report = Annotated[str | None, typer.Option(metavar="PATH", help="write a page of all that is known, HTML")]

AsJson = Annotated[bool, typer.Option("--json", help="print everything as JSON, and nothing else")]
ImgSize = Annotated[
    str | None,
    typer.Option(metavar="NUMBER", help="pixels, as 384 or 384x256: height and width (default: the model's)"),
]
Mean = Annotated[
    str | None,
    typer.Option(metavar="NUMBERS", help="of values from 0 to 1, as 0.5,0.5,0.5 (default: the model's, or file's)"),
]
Std = Annotated[str | None, typer.Option(metavar="NUMBERS", help="of values from 0 to 1, as --mean")]
CropPct = Annotated[float | None, typer.Option(help="share of the scaled image that is seen")]
Interpolation = Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest, box, hamming or lanczos")]

# Of eval and report: the float model beside the file.
Against = Annotated[
    str | None, typer.Option(metavar="FILE|MODEL", help="float ONNX file, or model as for quantize, to compare with")
]
AgainstWeights = Annotated[Path | None, typer.Option("--weights", help="of the model in --against, as for quantize")]
AgainstEntry = Annotated[str | None, typer.Option("--weights-entry", help="of the model in --against, as for quantize")]
AgainstEma = Annotated[bool | None, typer.Option("--ema/--no-ema", help="of the model in --against")]
AgainstArg = Annotated[list[str] | None, typer.Option("--model-arg", help="of the model in --against, as for quantize")]
