"""Some pictures of --data, evenly spread, as pixels: for commands that look at a file which exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ptq4vit_fx.data.pictures import Picture, check_float_shape, evenly_spread
from ptq4vit_fx.data.preprocessing import transform_of
from ptq4vit_fx.data.reading import load_named, said_of_skipped
from ptq4vit_fx.data.sources import open_images
from ptq4vit_fx.errors import warn


def some_images(operation: str, data: Path, config: dict[str, Any], count: int) -> tuple[list[Picture], Tensor]:
    """Return up to `count` pictures and their pixels, (images, channels, height, width), by timm's data config.

    Warns (PTQWarning) of those that cannot be read. Raises PTQError on data that hold none, or of another size.
    """
    listed = open_images(data)
    check_float_shape(listed, tuple(config["input_size"]), data)
    taken = [listed.items[number] for number in evenly_spread(len(listed.items), count)]
    skipped: list[str] = []
    found = load_named(taken, transform_of(config), skipped, config["input_size"][0])
    if skipped:
        warn(f"{operation}: {said_of_skipped(skipped)}")
    return found
