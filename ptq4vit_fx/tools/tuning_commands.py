"""The commands beside tuning: `timings` of a model's products, and `why` a file is worse than float."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ptq4vit_fx.tools.options import AsJson
from ptq4vit_fx.tools.terminal import readable_errors, say, say_json, showing

ModelArg = Annotated[list[str] | None, typer.Option(help="as for quantize")]


def timings(
    model: Annotated[str, typer.Argument(help="as for quantize; its weights are not needed")],
    model_arg: ModelArg = None,
    target: Annotated[
        str, typer.Option(help="onnxruntime, onnxruntime-avx2, onnxruntime-arm or generic")
    ] = "onnxruntime",
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 1,
    advise: Annotated[bool, typer.Option("--advise", help="print what int8 saves here, in place of the file")] = False,
    as_json: AsJson = False,
) -> None:
    """Print how long each product of a model takes here, float and int8, as the file that quantize --timings reads."""
    with readable_errors():
        phases = showing(not as_json)
        from ptq4vit_fx.tools.advise import advice_of, time_model
        from ptq4vit_fx.tools.phases import MEASURE

        with phases(MEASURE):
            shapes, found = time_model(model, model_arg or [], target, batch)
        if not advise:
            say(found.to_json(), highlight=False)
        elif as_json:
            say_json({"advice": advice_of(shapes, found), "timings": json.loads(found.to_json())})
        else:
            say("\n".join(advice_of(shapes, found)), highlight=False)


def why(
    file: Annotated[Path, typer.Argument(help="calibration (--checkpoint of quantize), or ONNX file")],
    data: Annotated[Path, typer.Option(help="images, as for quantize, others than those of the calibration")],
    model: Annotated[str | None, typer.Option(help="that it is of, as for quantize (default: the file says)")] = None,
    weights: Annotated[Path | None, typer.Option(help="as for quantize")] = None,
    weights_entry: Annotated[str | None, typer.Option(help="as for quantize")] = None,
    model_arg: ModelArg = None,
    images: Annotated[int, typer.Option(min=8, help="to measure on")] = 64,
    as_json: AsJson = False,
) -> None:
    """Name the products, operands, channels and tokens that a quantized model loses by, and measure what would help."""
    with readable_errors():
        phases = showing(not as_json)
        from ptq4vit_fx.tools.remade import Named
        from ptq4vit_fx.tools.why_command import explain

        named = Named(model, weights, weights_entry, tuple(model_arg or ()))
        found = explain(file, data, named, images, phases)
        if as_json:
            say_json(found.to_dict())
        else:
            say(found, highlight=False)
