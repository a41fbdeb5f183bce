"""The model that a file or a calibration is of: its plan and facts, its network, how its images are prepared."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ptq4vit_fx.data.preprocessing import at_size
from ptq4vit_fx.errors import failure, foreign, warn
from ptq4vit_fx.export.metadata import PLAN_KEY, PROVENANCE_KEY, provenance
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.preprocessing import SIZE, recorded
from ptq4vit_fx.inputs.sizes import COPIES, FLOAT_BYTES, check_memory
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.tools.image_options import IMG_SIZE, image_options
from ptq4vit_fx.tools.models import parse_arguments
from ptq4vit_fx.tools.named.model import Asked


@dataclass(frozen=True)
class Named:
    """The model as the command line names it beside a file, all of it optional: what is not said, the file says."""

    name: str | None = None
    weights: Path | None = None
    entry: str | None = None
    arguments: tuple[str, ...] = ()


def network_of(operation: str, file: Path, facts: dict[str, Any], named: Named) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model that a file or calibration is of, and how its images are prepared.

    facts: its provenance. Raises PTQError if nothing says what model it is.
    """
    name = named.name or facts.get("model")
    if not isinstance(name, str):
        do = "pass --model"
        raise failure(operation, str(file), expected="the name of its model", got="none", do=do)
    asked = Asked(name, named.weights, named.entry, arguments=named.arguments or _arguments(facts))
    return _as_recorded(operation, asked, facts, str(file))


def float_network(operation: str, file: Path, asked: Asked) -> nn.Module:
    """Return the float model that a file is compared with, built as the file says unless `asked` says otherwise.

    Raises PTQError as `load_model`, and on a file that cannot be read. Warns (PTQWarning) where the file was made of a
    checkpoint and the model of the same name is to be taken without one.
    """
    facts = provenance(dict(load_file(file).metadata_props), operation, str(file))
    sized = IMG_SIZE not in facts or IMG_SIZE in parse_arguments(asked.arguments)
    known = {} if sized else {IMG_SIZE: facts[IMG_SIZE]}
    if facts.get("model") == asked.name:
        asked = replace(asked, arguments=asked.arguments or _arguments(facts))
        if asked.weights is None and asked.pretrained and "weights" in facts:
            warn(
                f"{operation}: --against {asked.name}: it is compared as it is without a checkpoint, and the file was "
                f"made of {facts['weights']}; pass --weights {facts['weights']}"
            )
    return _as_recorded(operation, asked, known, str(file))[0]


def of_file(operation: str, file: Path) -> tuple[QuantPlan, dict[str, Any]]:
    """Return the plan and the facts of an ONNX file; raises PTQError if it has none."""
    with foreign(operation, str(file), expected="an ONNX file written by quantize", do="pass one, or a calibration"):
        model = load_file(file)
        metadata = dict(model.metadata_props)
    if PLAN_KEY not in metadata:
        do = "pass a file that quantize wrote, or a calibration"
        raise failure(operation, str(file), expected="a file of this package", got="one without a plan", do=do)
    return QuantPlan.from_json(metadata[PLAN_KEY], operation, str(file)), provenance(metadata, operation, str(file))


def _arguments(facts: dict[str, Any]) -> tuple[str, ...]:
    """Return the `--model-arg` that a file was quantized with, as far as it says them."""
    said = facts.get("model_args")
    return tuple(map(str, said)) if isinstance(said, list) else ()


def _as_recorded(operation: str, asked: Asked, facts: dict[str, Any], file: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model, and how its images are prepared, at the size and as the file says, else as the model does."""
    size = facts.get(IMG_SIZE)
    options = image_options(operation, size if isinstance(size, str) else None)
    named, known = options.build(asked), recorded({PROVENANCE_KEY: json.dumps(facts)}, file, operation)
    config = options.applied(named.preprocessing, asked.arguments)
    one = COPIES * FLOAT_BYTES * math.prod(config[SIZE])
    check_memory(operation, file, one, what="an image of its size", do="pass another file")
    return named.network, config if known is None else at_size(known, config[SIZE])
