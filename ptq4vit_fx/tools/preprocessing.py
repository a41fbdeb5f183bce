"""How a file says that images are prepared: timm's data config in its metadata, which may hold anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ptq4vit_fx.errors import quoted
from ptq4vit_fx.export.metadata import PROVENANCE_KEY, provenance
from ptq4vit_fx.inputs.records import Place, read_as

EVAL = "eval"
#: An image is scaled to its side over crop_pct before it is cropped: below this, a picture becomes a wall.
SMALLEST_CROP = 0.05


@dataclass(frozen=True)
class Preprocessing:
    """What timm's evaluation transform takes beside the input size."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"] = "bicubic"
    crop_pct: float | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None


def recorded(metadata: Mapping[str, str], file: str) -> dict[str, Any] | None:
    """Return the data config that a file records, without its input size; None if it records none.

    Entries of other names are left out. Raises PTQError on values that are none of a data config.
    """
    config = provenance(metadata, EVAL, file).get("preprocessing")
    if config is None:
        return None
    do = "pass --model with the timm model that it was made from"
    place = Place(EVAL, f"{file}: {PROVENANCE_KEY}", "preprocessing", do)
    known = {field.name for field in fields(Preprocessing)}
    entries = {key: entry for key, entry in config.items() if key in known} if isinstance(config, dict) else config
    read: Preprocessing = read_as(Preprocessing, entries, place)
    if {len(read.mean), len(read.std)} not in ({1}, {3}) or not all(map(math.isfinite, (*read.mean, *read.std))):
        raise place.refusal("finite mean and std, of 1 or 3 channels", f"{quoted(read.mean)} and {quoted(read.std)}")
    if min(read.std) <= 0:
        raise place.at("std").refusal("positive numbers", quoted(read.std))
    if read.crop_pct is not None and not SMALLEST_CROP <= read.crop_pct <= 1:
        raise place.at("crop_pct").refusal(f"{SMALLEST_CROP} to 1", quoted(read.crop_pct))
    return asdict(read)
