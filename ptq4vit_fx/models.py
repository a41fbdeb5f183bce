"""Models and images by name and path, for the command line: timm models, checkpoints, folders of images."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ptq4vit_fx.errors import failure, near_names

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"])


def create_model(name: str, weights: Path | None, arguments: list[str]) -> nn.Module:
    """Return a timm model in evaluation mode with weights from the hub or from a local safetensors or pth file.

    arguments: `key=value` of timm.create_model, such as img_size=64. Raises PTQError on an unknown name (with near
    names), a checkpoint that does not fit, and weights that cannot be downloaded.
    """
    if name not in timm.list_models() and not timm.is_model(name):
        do = f"did you mean {near_names(name, timm.list_models(), 3)}?"
        raise failure("create model", repr(name), expected="a timm model name", got="an unknown name", do=do)
    try:
        model: nn.Module = timm.create_model(name, pretrained=weights is None, **_parse(arguments))
    except Exception as error:
        do = "check --model-arg, or pass --weights FILE with a local checkpoint"
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise failure("create model", name, expected="a model with its weights", got=got, do=do) from error
    if weights is not None:
        _load(model, weights)
    return model.eval()


def _parse(arguments: list[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            do = "write --model-arg img_size=64"
            raise failure("read --model-arg", repr(argument), expected="key=value", got="no '='", do=do)
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def _load(model: nn.Module, path: Path) -> None:
    do = "pass the checkpoint of this model, and --model-arg for its size and classes"
    try:
        if path.suffix == ".safetensors":
            state: dict[str, Any] = dict(load_file(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state.get(key, state) if isinstance(state.get(key), dict) else state
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError, AttributeError, ValueError) as error:
        got = " ".join(str(error).split())[:300]
        raise failure("load weights", str(path), expected="a state dict of this model", got=got, do=do) from error


@dataclass(frozen=True)
class ImageFolder:
    """Readable images of a folder, preprocessed: tensors, labels (index of the sub-folder), and what was skipped."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...]


def model_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """Return timm's own evaluation preprocessing of this model."""
    transform: Callable[[Image.Image], Tensor] = timm.data.create_transform(**data_config(model))
    return transform


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's data config of the model, JSON-ready, at the input size that the model was created with."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        config["input_size"] = (config["input_size"][0], *size)
    return config


def load_folder(
    folder: Path, transform: Callable[[Image.Image], Tensor], limit: int | None, *, labelled: bool = False
) -> ImageFolder:
    """Read up to `limit` images of a folder, nested or flat, evenly spread over it in the order of their paths.

    labelled: only images in class sub-folders count, each with the index of its sub-folder. Unreadable files are
    skipped by name. Raises PTQError if the folder is missing or holds no readable image.
    """
    do = "pass a folder that holds .jpg or .png files" + (" in one sub-folder per class" if labelled else "")
    if not folder.is_dir():
        raise failure("read images", str(folder), expected="a folder of images", got="no such folder", do=do)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    classes = tuple(sorted({p.relative_to(folder).parts[0] for p in paths if p.parent != folder}))
    if labelled:
        paths = [p for p in paths if p.parent != folder]
    if limit is not None and len(paths) > limit:
        paths = [paths[i * len(paths) // limit] for i in range(limit)]
    images, labels, skipped = [], [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(transform(image.convert("RGB")))
        except (OSError, UnidentifiedImageError, ValueError) as error:
            skipped.append(f"{path}: {error}")
            continue
        labels.append(classes.index(path.relative_to(folder).parts[0]) if path.parent != folder else -1)
    if not images:
        got = f"none readable of {len(skipped)}" if skipped else "an empty folder"
        raise failure("read images", str(folder), expected="one image or more", got=got, do=do)
    return ImageFolder(torch.stack(images), torch.tensor(labels), classes, tuple(skipped))
