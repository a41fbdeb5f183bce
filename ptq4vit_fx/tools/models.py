"""Models and images by name and path, for the command line: timm models, checkpoints, folders of images."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from ptq4vit_fx.errors import LONGEST_REASON, failure, near_names, printable, some_names
from ptq4vit_fx.files import not_a_file
from ptq4vit_fx.tools.checkpoint_files import only_weights
from ptq4vit_fx.tools.checkpoints import load_weights
from ptq4vit_fx.tools.image_files import IMAGE_SUFFIXES, MODES, contents, opened

#: Digits of a class number: more would be a date or an identifier.
DIGITS = 9


def create_model(
    name: str,
    weights: Path | None,
    arguments: Sequence[str],
    *,
    entry: str | None = None,
    ema: bool | None = None,
    said: list[str] | None = None,
) -> nn.Module:
    """Return a timm model in evaluation mode with weights from the hub or from a local safetensors or pth file.

    arguments: `key=value` of timm.create_model, such as img_size=64. entry, ema: of the file, what to take (see
    `load_weights`, whose line on what was taken is appended to `said`). Raises PTQError on an unknown name (with near
    names), a checkpoint that does not fit, and weights that cannot be downloaded.
    """
    check_name(name, "create model")
    model = timm_model(name, arguments, pretrained=weights is None)
    if weights is not None:
        line = load_weights(model, weights, entry, ema=ema, convert=lambda state: translated(state, model))
        if line and said is not None:
            said.append(line)
    return model.eval()


def timm_model(name: str, arguments: Sequence[str], *, pretrained: bool) -> nn.Module:
    """Return what timm.create_model makes; raises PTQError in the place of whatever it raises."""
    given = parse_arguments(arguments)
    try:
        with only_weights():
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **given)
    except Exception as error:
        do = "check --model-arg, or pass --weights FILE with a local checkpoint"
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise failure("create model", name, expected="a model with its weights", got=got, do=do) from error
    size = _input_size(model)
    if min(size) < 1:  # which no timm model computes, and not every release refuses
        got, do = f"{size[0]} x {size[1]}", "check --model-arg img_size"
        raise failure("create model", name, expected="images of one pixel or more", got=got, do=do)
    return model


def translated(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """Return weights of another project by a timm model's names, as timm has it for its downloads; None if it cannot.

    Of a model without classes the classifier is left out.
    """
    translate = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    try:
        found: dict[str, Tensor] = dict(translate(state, model)) if translate else state
    except Exception:  # noqa: BLE001 - it expects a checkpoint of its own, and may find anything
        return None
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    dropped = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    none = getattr(model, "num_classes", None) == 0
    return {key: x for key, x in found.items() if not (none and dropped and key.startswith(dropped))}


def check_name(name: str, operation: str) -> None:
    """Raise PTQError with near names if timm has no model of that name."""
    if name not in timm.list_models() and not timm.is_model(name):
        do = f"did you mean {near_names(name, timm.list_models(), 3)}?"
        raise failure(operation, repr(name), expected="a timm model name", got="an unknown name", do=do)


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of `key=value`, as Python reads them, else as text; raises PTQError on what has no "="."""
    parsed: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            do = "write --model-arg img_size=64"
            raise failure("read --model-arg", repr(argument), expected="key=value", got="no '='", do=do)
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # brackets nested too deep
            parsed[key] = value
    return parsed


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's data config of the model, JSON-ready, at the input size and channels that it was created with.

    Raises PTQError if it has other channels than 1 or 3.
    """
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    channels, size = config["input_size"][0], _input_size(model)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = channels if first is None else first.in_channels
    if channels not in MODES:
        do = "preprocess the images in Python and call ptq4vit_fx.quantize"
        got = f"a model of {channels} channels"
        raise failure("read images", type(model).__name__, expected="images of 1 or 3 channels", got=got, do=do)
    return at_size(config, (channels, *size))


def _input_size(model: nn.Module) -> tuple[int, ...]:
    """Return the height and width that a timm model was created with."""
    size = timm.data.resolve_model_data_config(model)["input_size"][1:]
    return tuple(getattr(getattr(model, "patch_embed", None), "img_size", None) or size)


def at_size(config: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
    """Return a data config at an input size, (channels, height, width); one channel has the average mean and std."""
    config = config | {"input_size": size}
    if size[0] == 1:
        config |= {key: (round(sum(config[key]) / len(config[key]), 6),) for key in ("mean", "std")}
    return config


@dataclass(frozen=True)
class ImageFolder:
    """Paths of a folder's images, and, if it is labelled, the class of each: the number of its sub-folder."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()


def list_images(folder: Path, *, limit: int | None = None, labelled: bool = False) -> ImageFolder:
    """List up to `limit` images of a folder, nested or flat, evenly spread over it in the order of their paths.

    Links are followed; hidden files and folders and what programs leave behind are passed over. labelled: only images
    in sub-folders count. All sub-folders, empty ones too, are the classes, in the order of their names, as in
    torchvision's ImageFolder; if all names are numbers, the numbers themselves. Raises PTQError if the folder is
    missing or holds no image.
    """
    do = "pass a folder that holds .jpg or .png files" + (" in one sub-folder per class" if labelled else "")
    if not os.path.isdir(folder):
        got, do = _instead_of_a_folder(folder, do)
        raise failure("read images", str(folder), expected="a folder of images", got=got, do=do)
    found = contents(folder, per_subfolder=labelled)
    paths = [path for path in found.images if not labelled or path.parent != folder]
    if not paths:
        others = [path.name for path in (*found.others, *found.images)]
        got = f"{len(others)} other files, such as {others[0]}" if others else "an empty folder"
        raise failure("read images", str(folder), expected="one image or more", got=got, do=do)
    if limit is not None:
        paths = evenly_spread(paths, limit)
    if not labelled:
        return ImageFolder(tuple(paths))
    numbers = class_numbers(found.folders) or {name: number for number, name in enumerate(found.folders)}
    counts = Counter(numbers.values())
    same = [name for name in found.folders if counts[numbers[name]] > 1]
    if same:
        do = "put their images into one"
        raise failure("read images", str(folder), expected="one sub-folder per class", got=some_names(same), do=do)
    depth = len(folder.parts)
    return ImageFolder(tuple(paths), tuple(numbers[path.parts[depth]] for path in paths), found.folders)


def evenly_spread(paths: Sequence[Path], limit: int) -> list[Path]:
    """Return so many of some paths, at equal distances; all of them if they are fewer."""
    return list(paths) if len(paths) <= limit else [paths[i * len(paths) // limit] for i in range(limit)]


def class_numbers(classes: Sequence[str]) -> dict[str, int]:
    """Return name -> class number if all sub-folders are named by one, else {}."""
    numbers = {name: class_number(name) for name in classes}
    found = {name: number for name, number in numbers.items() if number is not None}
    return found if len(found) == len(numbers) else {}


def class_number(name: str) -> int | None:
    """Return the number that a sub-folder is named by, in digits of ASCII; None if it is named by something else."""
    return int(name) if re.fullmatch(f"[0-9]{{1,{DIGITS}}}", name) else None


def _instead_of_a_folder(path: Path, do: str) -> tuple[str, str]:
    """Return what is there where a folder is expected, and what to do about it."""
    if not os.path.exists(path):
        return "no such folder", do
    if path.suffix.lower() in {".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"}:
        return "an archive", "unpack it and pass the folder"
    if path.suffix.lower() in {".npy", ".npz", ".pt", ".pth", ".safetensors", ".h5", ".parquet"}:
        return "a file of arrays", "pass preprocessed arrays to ptq4vit_fx.quantize(model, images) in Python"
    do = "pass the folder that holds it" if path.suffix.lower() in IMAGE_SUFFIXES else do
    return not_a_file(path) or "a file", do


def read_images(
    paths: Iterable[Path], transform: Callable[[Image.Image], Tensor], skipped: list[str], channels: int = 3
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the path, preprocessed image); unreadable files go to `skipped`, `path: reason`, instead."""
    for number, path in enumerate(paths):
        try:
            tensor = transform(opened(path, channels))
        except Exception as error:  # noqa: BLE001 - a broken file raises anything: SyntaxError, struct.error, a bomb's own
            reason = str(error).strip().splitlines() or [type(error).__name__]
            skipped.append(printable(f"{path}: {reason[0][:LONGEST_REASON]}"))
            continue
        yield number, tensor


def said_of_skipped(skipped: Sequence[str]) -> str:
    """Return one line for files that were skipped: how many, and the first few with their reasons."""
    return f"skipped {len(skipped)} file{'s' * (len(skipped) > 1)}: {some_names(skipped, separator='; ')}"


def load_named(
    paths: Sequence[Path], transform: Callable[[Image.Image], Tensor], skipped: list[str], channels: int = 3
) -> tuple[list[Path], Tensor]:
    """Return the paths of the readable images and their pixels, (images, channels, height, width).

    Raises PTQError if none is readable.
    """
    read = list(read_images(paths, transform, skipped, channels))
    if not read:
        raise failure(
            "read images",
            str(paths[0].parent),
            expected="one readable image or more",
            got=f"none of {len(skipped)}, the first: {skipped[0]}",
            do="check the files",
        )
    return [paths[number] for number, _ in read], torch.stack([image for _, image in read])
