"""How a model wants its pictures: timm's data config, at the size that the model was built at."""

from __future__ import annotations

from typing import Any

from torch import nn

from ptq4vit_fx.data.image_files import MODES
from ptq4vit_fx.data.reading import Transform
from ptq4vit_fx.errors import PTQError, failure
from ptq4vit_fx.inputs.plausible import normalization_of

#: Where a prepared model keeps the data config of the model that it was made from.
PREPROCESSING = "ptq4vit_preprocessing"


def own_config(model: Any) -> dict[str, Any] | None:
    """Return the data config of a model that has one of timm's, for images; None of any other."""
    if normalization_of(model) is None:
        return None
    try:
        return data_config(model)
    except (PTQError, TypeError, ValueError, KeyError, AttributeError):  # a model of somebody else's, with such a name
        return None


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's data config of the model, JSON-ready, at the input size and channels that it was created with.

    Raises PTQError if it has other channels than 1 or 3.
    """
    import timm.data

    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    channels, size = channels_of(model, config["input_size"][0]), built_size(model)
    if channels not in MODES:
        do = "preprocess the images in Python and call ptq4vit_fx.quantize"
        got = f"a model of {channels} channels"
        raise failure("read images", type(model).__name__, expected="images of 1 or 3 channels", got=got, do=do)
    return at_size(config, (channels, *size))


def built_size(model: nn.Module) -> tuple[int, ...]:
    """Return the height and width that a timm model was created with, as far as it says them."""
    import timm.data

    built = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "img_size", None)
    return sides(built) or tuple(timm.data.resolve_model_data_config(model)["input_size"][1:])


def channels_of(model: nn.Module, otherwise: int = 3) -> int:
    """Return the channels of the images that a model takes: those of its first convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return otherwise if first is None else first.in_channels


def sides(size: Any) -> tuple[int, int] | None:
    """Return the height and width that a model or an argument says, a number for both; None if it says neither."""
    both = (size, size) if isinstance(size, int) else size
    right = isinstance(both, (tuple, list)) and len(both) == 2 and all(isinstance(side, int) for side in both)
    return (both[0], both[1]) if right else None


def at_size(config: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
    """Return a data config at an input size, (channels, height, width), with mean and std of that many channels.

    One channel has the average of three, and three have the number of one.
    """
    config = config | {"input_size": size}
    for key in ("mean", "std"):
        if size[0] == 1:
            config[key] = (round(sum(config[key]) / len(config[key]), 6),)
        elif len(config[key]) == 1:
            config[key] = (*config[key],) * size[0]
    return config


def transform_of(config: dict[str, Any]) -> Transform:
    """Return what timm evaluates a model of this data config with."""
    import timm.data

    made: Transform = timm.data.create_transform(**config)
    return made
