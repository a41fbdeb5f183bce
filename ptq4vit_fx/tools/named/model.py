"""What a name of a model stands for: the network, how its images are prepared, its classes, and where it is from."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ptq4vit_fx.data.preprocessing import channels_of, sides
from ptq4vit_fx.errors import PTQError, failure, foreign, warn
from ptq4vit_fx.export.proof.against_float import Kind
from ptq4vit_fx.tools.checkpoint_entries import Convert
from ptq4vit_fx.tools.checkpoints import load_weights

CREATE = "create model"
#: Pixels of a side where nobody says another number.
SIDE = 224
#: How images are prepared where nobody says it: as timm does it, by the numbers of ImageNet.
IMAGENET: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


@dataclass(frozen=True)
class Asked:
    """A model as the command line names it.

    weights: its checkpoint, a file or a folder, None for the weights that the name stands for. entry, ema: what of the
    checkpoint to take, as for `load_weights`. arguments: `key=value`. pretrained: False if its weights are not needed.
    """

    name: str
    weights: Path | None = None
    entry: str | None = None
    ema: bool | None = None
    arguments: tuple[str, ...] = ()
    pretrained: bool = True

    def origin(self) -> dict[str, Any]:
        """Return what has to be said to get this model again, JSON-ready; what was not said is left out."""
        said = {
            "model": self.name,
            "model_args": list(self.arguments),
            "weights": None if self.weights is None else str(self.weights),
            "weights_entry": self.entry,
            "ema": self.ema,
        }
        return {key: value for key, value in said.items() if value not in (None, [])}


@dataclass(frozen=True)
class NamedModel:
    """A float model in evaluation mode.

    preprocessing: timm's data config, JSON-ready, with the size of the input. labels: a name per class, None where they
    are not known. kind: what the output is, None where the model does not say. said: lines that the user should read.
    """

    network: nn.Module
    preprocessing: dict[str, Any]
    labels: tuple[str, ...] | None = None
    kind: Kind | None = None
    said: tuple[str, ...] = ()


def with_weights(network: nn.Module, asked: Asked, convert: Convert | None = None) -> tuple[str, ...]:
    """Load the checkpoint that is asked for, if one is; return what is to be said of it. Raises as `load_weights`."""
    if asked.weights is None or not asked.pretrained:
        return ()
    line = load_weights(network, asked.weights, asked.entry, ema=asked.ema, convert=convert)
    return (line,) if line else ()


def side_of(network: nn.Module) -> tuple[int, int] | None:
    """Return height and width that a network says it is made for, None if it does not."""
    holders = [network, getattr(network, "patch_embed", None), getattr(network, "config", None)]
    for holder in holders:
        for name in ("image_size", "img_size"):
            size = getattr(holder, name, None)
            found = None if isinstance(size, bool) else sides(size)
            if found is not None and min(found) > 0:
                return found
    return None


def guessed_preprocessing(network: nn.Module, name: str, do: str) -> dict[str, Any]:
    """Return ImageNet's preprocessing at the size that a network says, and warn (PTQWarning) that it is a guess."""
    height, width = side_of(network) or (SIDE, SIDE)
    warn(f"{CREATE}: {name}: how its images are prepared is not known; taken is {height} x {width}, ImageNet's; {do}")
    return IMAGENET | {"input_size": (channels_of(network), height, width)}


def crop_share(side: int, resized: int) -> float:
    """Return the crop_pct by which timm resizes to `resized` pixels before it crops `side` of them.

    timm takes floor(side / crop_pct), which rounding must not bring below.
    """
    share = side / resized
    return share if int(side / share) == resized else side / (resized + 0.25)


@contextmanager
def made_by_others(name: str, *, expected: str, do: str) -> Iterator[None]:
    """Turn whatever a library raises while it makes a model into a PTQError of one sentence."""
    try:
        with foreign(CREATE, name, expected=expected, do=do):
            yield
    except PTQError as error:
        if not _is_pickle(error):
            raise
        got, do = "a pickle that holds more than weights", "save them as safetensors where its classes are at hand"
        raise failure(CREATE, name, expected=expected, got=got, do=do) from error


def _is_pickle(error: BaseException | None) -> bool:
    """Return whether torch refused to unpickle; what it says then is how to let it run."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__  # some releases of transformers raise anew
    return error is not None
