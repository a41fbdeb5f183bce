"""Options of the command line that say how pictures become pixels, in the place of what the model says."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from ptq4vit_fx.data.preprocessing import at_size, sides
from ptq4vit_fx.errors import PTQError, failure, foreign, quoted, unknown_name
from ptq4vit_fx.export.preprocessing import SMALLEST_CROP, Preprocessing
from ptq4vit_fx.tools.models import parse_arguments
from ptq4vit_fx.tools.named.kinds import kind_of, load_model
from ptq4vit_fx.tools.named.model import Asked, NamedModel

INTERPOLATIONS: tuple[str, ...] = get_args(get_type_hints(Preprocessing)["interpolation"])
#: A number of pixels that a side may have: digits, few enough.
SIDE = "([1-9][0-9]{0,4})"
#: What a file calls the size that was asked for.
IMG_SIZE = "img_size"
#: Kinds of names of which some are models of timm, which may be built at a size.
SIZED = ("timm", "huggingface")
#: How models that are built at none say it: those of timm, and configurations of transformers.
SIZELESS = ("unexpected keyword argument 'img_size'", "--model-arg img_size: expected an entry of its config")


@dataclass(frozen=True)
class ImageOptions:
    """What of a data config was asked for, None of what was not; size: (height, width)."""

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None

    def origin(self) -> dict[str, Any]:
        """Return what has to be said beside the model's name to build it again, JSON-ready; read by `image_options`."""
        return {} if self.size is None else {IMG_SIZE: _written(self.size)}

    def applied(self, config: dict[str, Any], arguments: Sequence[str] = ()) -> dict[str, Any]:
        """Return a data config with what was asked for in it.

        arguments: of --model-arg; an img_size there is the size that the model was built at, which a model need not
        say of itself (timm's MaxViT, LeViT and others do not).
        """
        given = {"mean": self.mean, "std": self.std, "crop_pct": self.crop_pct, "interpolation": self.interpolation}
        channels, *size = config["input_size"]
        size = self.size or sides(parse_arguments(arguments).get("img_size")) or size
        return at_size(config | {key: value for key, value in given.items() if value is not None}, (channels, *size))

    def build(self, asked: Asked) -> NamedModel:
        """Return the model that is asked for, at the size that was asked for where it is timm's and built at one.

        Convolutional models take any size, and have no `img_size`; of models of other kinds timm's alone know it.
        Raises PTQError if arguments name another size.
        """
        if self.size is None:
            return load_model(asked)
        other = sides(parse_arguments(asked.arguments).get("img_size"))
        if other not in (None, self.size):
            got, do = f"{_written(self.size)} beside --model-arg img_size={_written(other)}", "leave one of them out"
            raise failure("quantize", "--img-size", expected="one size", got=got, do=do)
        if kind_of(asked.name) not in SIZED:
            return load_model(asked)
        size = f"img_size={self.size[0] if len({*self.size}) == 1 else self.size}"
        try:
            return load_model(replace(asked, arguments=(*asked.arguments, size)))
        except PTQError as error:
            if not any(refusal in str(error) for refusal in SIZELESS):
                raise
        return load_model(asked)

    def check_taken(self, network: nn.Module, size: Sequence[int]) -> None:
        """Raise PTQError if a size was asked for, (channels, height, width), that the network does not take."""
        if self.size is None:
            return
        subject = f"--img-size {_written(self.size)}"
        expected, do = "a size that the model takes", "leave it out, or build the model at it with --model-arg"
        with torch.inference_mode(), foreign("quantize", subject, expected=expected, do=do):
            network(torch.zeros(1, *size))


def image_options(
    operation: str,
    img_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> ImageOptions:
    """Read the options; raises PTQError on what no preprocessing has."""
    size = None
    if img_size is not None:
        match = re.fullmatch(f"{SIDE}(?:[x,]{SIDE})?", img_size)
        if match is None:
            do = "write --img-size 224, or 224x192 for height and width"
            raise failure(operation, "--img-size", expected="pixels", got=quoted(img_size), do=do)
        size = (int(match[1]), int(match[2] or match[1]))
    if crop_pct is not None and not SMALLEST_CROP <= crop_pct <= 1:
        do = "write the share of the scaled image that is seen, such as 0.9"
        expected = f"{SMALLEST_CROP} to 1"
        raise failure(operation, "--crop-pct", expected=expected, got=f"{crop_pct:g}", do=do)
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise unknown_name(operation, "--interpolation", interpolation, INTERPOLATIONS)
    averages, spreads = _numbers(operation, "--mean", mean), _numbers(operation, "--std", std)
    if spreads is not None and min(spreads) <= 0:
        do = "write the standard deviation of values from 0 to 1"
        raise failure(operation, "--std", expected="numbers above 0", got=quoted(std), do=do)
    for option, numbers in (("--mean", averages), ("--std", spreads)):
        if numbers is not None and max(map(abs, numbers)) > 1:
            do = f"divide by 255: {option} {','.join(f'{number / 255:.4g}' for number in numbers)}"
            got = ",".join(f"{number:g}" for number in numbers)
            raise failure(operation, option, expected="numbers for values from 0 to 1", got=got, do=do)
    return ImageOptions(size, averages, spreads, crop_pct, interpolation)


def _numbers(operation: str, option: str, text: str | None) -> tuple[float, ...] | None:
    """Return one number, or three, that a comma or spaces part."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        do = f"write {option} 0.5,0.5,0.5"
        raise failure(operation, option, expected="one number, or one per channel", got=quoted(text), do=do)
    return numbers


def _written(size: tuple[int, int] | None) -> str:
    return "x".join(map(str, size or ()))
