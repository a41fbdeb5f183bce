"""How images become the input of a file: timm's data config, as a user gives it and as a file's metadata holds it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ptq4vit_fx.errors import failure, quoted
from ptq4vit_fx.export.metadata import PROVENANCE_KEY, provenance
from ptq4vit_fx.inputs.records import Place, read_as, read_json

#: An image is scaled to its side over crop_pct before it is cropped: below this, a picture becomes a wall.
SMALLEST_CROP = 0.05
#: What timm's data config says beside: the file's own input says it.
SIZE = "input_size"


@dataclass(frozen=True)
class Preprocessing:
    """What timm's evaluation transform takes beside the input size."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"] = "bicubic"
    crop_pct: float | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None


def recorded(metadata: Mapping[str, str], file: str, operation: str = "eval") -> dict[str, Any] | None:
    """Return the data config that a file records, without its input size; None if it records none.

    Entries of other names are left out. operation: what reads it, for the PTQError that values are which are none of
    a data config.
    """
    config = provenance(metadata, operation, file).get("preprocessing")
    if config is None:
        return None
    do = "pass --model with the timm model that it was made from"
    place = Place(operation, f"{file}: {PROVENANCE_KEY}", "preprocessing", do)
    known = {field.name for field in fields(Preprocessing)}
    entries = {key: entry for key, entry in config.items() if key in known} if isinstance(config, dict) else config
    return asdict(_read(entries, place))


def preprocessing_of(config: Mapping[str, Any], shapes: list[tuple[int, ...]], operation: str) -> dict[str, Any]:
    """Return what a file records of a data config that a user gives, at the size of the images that it takes.

    config: as `timm.data.resolve_model_data_config(model)` gives it, mean and std at least. shapes: of the inputs, the
    batch first. Raises PTQError on entries that are none of a data config, and unless the only input is images of as
    many channels as mean and std have, or of any number where they have one.
    """
    place = Place(operation, "preprocessing", do="pass what timm.data.resolve_model_data_config(model) returns")
    if not isinstance(config, Mapping):
        raise place.refusal("a mapping with mean and std", type(config).__name__)
    try:
        text = json.dumps({key: entry for key, entry in config.items() if key != SIZE}, default=lambda x: x.tolist())
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise place.refusal("numbers and names", quoted(config)) from error
    read = _read(read_json(text, place), place)
    if len(shapes) != 1 or len(shapes[0]) != 4:
        got, do = " and ".join(map(str, shapes)), "leave preprocessing out"
        expected = "one input of images (batch, channels, height, width)"
        raise failure(operation, "preprocessing", expected=expected, got=got, do=do)
    channels = shapes[0][1]
    if len(read.mean) not in (1, channels):
        got, do = f"{len(read.mean)}", "pass one for each channel"
        raise failure(operation, "preprocessing", expected=f"mean and std of {channels} channels", got=got, do=do)
    return asdict(read) | {SIZE: shapes[0][1:]}


def _read(entries: Any, place: Place) -> Preprocessing:
    """Return a data config; raises PTQError on another type, and on numbers that no preprocessing has."""
    read: Preprocessing = read_as(Preprocessing, entries, place)
    if {len(read.mean), len(read.std)} not in ({1}, {3}) or not all(map(math.isfinite, (*read.mean, *read.std))):
        raise place.refusal("finite mean and std, of 1 or 3 channels", f"{quoted(read.mean)} and {quoted(read.std)}")
    if min(read.std) <= 0:
        raise place.at("std").refusal("positive numbers", quoted(read.std))
    if read.crop_pct is not None and not SMALLEST_CROP <= read.crop_pct <= 1:
        raise place.at("crop_pct").refusal(f"{SMALLEST_CROP} to 1", quoted(read.crop_pct))
    return read
