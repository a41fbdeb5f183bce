"""`ptq4vit why`: the model that a calibration or a file is of, prepared as it was, and asked where it loses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from ptq4vit_fx.api import calibrate, load_calibration
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.data.preprocessing import at_size
from ptq4vit_fx.errors import failure, foreign
from ptq4vit_fx.export.metadata import PLAN_KEY, PROVENANCE_KEY, provenance
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.preprocessing import SIZE, recorded
from ptq4vit_fx.inputs.sizes import COPIES, FLOAT_BYTES, check_memory
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.tools.image_options import IMG_SIZE, image_options
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tools.phases import CALIBRATE, READ, Phases
from ptq4vit_fx.tools.some_images import some_images
from ptq4vit_fx.tuning.mixing import model_of_plan
from ptq4vit_fx.tuning.why import Why, why

#: Name, weights, entry of the weights, `--model-arg`.
Source = tuple[str | None, Path | None, str | None, tuple[str, ...]]
#: Images that the scales of a file are searched on again.
CALIBRATED = 32


def explain(
    file: Path,
    data: Path,
    source: Source,
    images: int,
    phases: Phases,
) -> Why:
    """Return where a quantized model loses.

    file: a calibration, or an ONNX file, whose scales are then searched again, as its plan says, on the first half of
    the images; the other half is measured on. phases: shows what is under way. Raises PTQError on anything
    else, and if nothing says what model it is.
    """
    calibration = None if file.suffix == ".onnx" else Calibration.load(file)
    plan, facts = (calibration.plan, calibration.provenance) if calibration is not None else _of_file(file)
    name, weights, entry, arguments = source
    name = name or facts.get("model")
    if not isinstance(name, str):
        do = "pass --model"
        raise failure("why", str(file), expected="the name of its model", got="none", do=do)
    asked = Asked(name, weights, entry, arguments=arguments or _arguments(facts))
    network, preprocessing = _as_recorded(asked, facts, str(file))
    with phases(READ):
        count = images + (0 if calibration is not None else CALIBRATED)
        _, pixels = some_images("why", data, preprocessing, count)
    prepared = model_of_plan(network, plan, pixels[:1])
    if calibration is None:
        count = min(CALIBRATED, len(pixels) // 2)
        with phases(CALIBRATE):
            calibrate(prepared, pixels[:count], progress=phases.show)
        pixels = pixels[count:]
    else:
        load_calibration(prepared, calibration)
    with phases("measure products one by one"):
        return why(prepared, pixels)


def _of_file(file: Path) -> tuple[QuantPlan, dict[str, Any]]:
    """Return the plan and the facts of an ONNX file; raises PTQError if it has none."""
    with foreign("why", str(file), expected="an ONNX file written by quantize", do="pass one, or a calibration"):
        model = load_file(file)
        metadata = dict(model.metadata_props)
    if PLAN_KEY not in metadata:
        do = "pass a file that quantize wrote, or a calibration"
        raise failure("why", str(file), expected="a file of this package", got="one without a plan", do=do)
    return QuantPlan.from_json(metadata[PLAN_KEY], "why", str(file)), provenance(metadata, "why", str(file))


def _arguments(facts: dict[str, Any]) -> tuple[str, ...]:
    """Return the `--model-arg` that a file was quantized with, as far as it says them."""
    said = facts.get("model_args")
    return tuple(map(str, said)) if isinstance(said, list) else ()


def _as_recorded(asked: Asked, facts: dict[str, Any], file: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model, and how its images are prepared, at the size and as the file says, else as the model does."""
    size = facts.get(IMG_SIZE)
    options = image_options("why", size if isinstance(size, str) else None)
    named, known = options.build(asked), recorded({PROVENANCE_KEY: json.dumps(facts)}, file, "why")
    config = options.applied(named.preprocessing, asked.arguments)
    one = COPIES * FLOAT_BYTES * math.prod(config[SIZE])
    check_memory("why", file, one, what="an image of its size", do="pass another file")
    return named.network, config if known is None else at_size(known, config[SIZE])
