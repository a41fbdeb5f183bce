"""Models and images by name and path, for the command line: timm models, checkpoints, folders of images."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable, Iterable, Iterator
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
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, AttributeError, ValueError) as error:
        got = " ".join(str(error).split())[:300]
        raise failure("load weights", str(path), expected="a state dict of this model", got=got, do=do) from error


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's data config of the model, JSON-ready, at the input size that the model was created with."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        config["input_size"] = (config["input_size"][0], *size)
    return config


@dataclass(frozen=True)
class ImageFolder:
    """Paths of a folder's images, and, if it is labelled, the class of each: the number of its sub-folder."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def list_images(folder: Path, *, limit: int | None = None, labelled: bool = False) -> ImageFolder:
    """List up to `limit` images of a folder, nested or flat, evenly spread over it in the order of their paths.

    labelled: only images in sub-folders count. The sub-folders are the classes, in the order of their names, or, if
    all names are numbers, the numbers themselves. Raises PTQError if the folder is missing or holds no image.
    """
    do = "pass a folder that holds .jpg or .png files" + (" in one sub-folder per class" if labelled else "")
    if not folder.is_dir():
        raise failure("read images", str(folder), expected="a folder of images", got="no such folder", do=do)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if labelled:
        paths = [p for p in paths if p.parent != folder]
    if not paths:
        raise failure("read images", str(folder), expected="one image or more", got="an empty folder", do=do)
    if limit is not None and len(paths) > limit:
        paths = [paths[i * len(paths) // limit] for i in range(limit)]
    names = [p.relative_to(folder).parts[0] for p in paths] if labelled else []
    classes = tuple(sorted(set(names)))
    numbered = all(name.isdigit() for name in classes)
    labels = tuple(int(name) if numbered else classes.index(name) for name in names)
    return ImageFolder(tuple(paths), labels, classes)


def read_images(
    paths: Iterable[Path], transform: Callable[[Image.Image], Tensor], skipped: list[str]
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the path, preprocessed image); unreadable files go to `skipped`, `path: reason`, instead."""
    for number, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                tensor = transform(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, ValueError) as error:
            skipped.append(f"{path}: {error}")
            continue
        yield number, tensor


def load_images(folder: Path, transform: Callable[[Image.Image], Tensor], limit: int, skipped: list[str]) -> Tensor:
    """Return up to `limit` readable images of a folder as one tensor (images, channels, height, width).

    Raises PTQError if none is readable.
    """
    images = [image for _, image in read_images(list_images(folder, limit=limit).paths, transform, skipped)]
    if not images:
        raise failure(
            "read images",
            str(folder),
            expected="one readable image or more",
            got=f"none of {len(skipped)}, the first: {skipped[0]}",
            do="check the files",
        )
    return torch.stack(images)
