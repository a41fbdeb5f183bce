"""Models by name and path, for the command line: timm models and checkpoints."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ptq4vit_fx.data.preprocessing import built_size
from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.tools.checkpoints import load_weights


def create_model(
    name: str, weights: Path | None, arguments: list[str], *, entry: str | None = None, said: list[str] | None = None
) -> nn.Module:
    """Return a timm model in evaluation mode with weights from the hub or from a local safetensors or pth file.

    arguments: `key=value` of timm.create_model, such as img_size=64. entry: of the file, the one to take (see
    `load_weights`, whose line on what was taken is appended to `said`). Raises PTQError on an unknown name (with near
    names), a checkpoint that does not fit, and weights that cannot be downloaded.
    """
    check_name(name, "create model")
    try:
        model: nn.Module = timm.create_model(name, pretrained=weights is None, **parsed(arguments))
    except Exception as error:
        do = "check --model-arg, or pass --weights FILE with a local checkpoint"
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise failure("create model", name, expected="a model with its weights", got=got, do=do) from error
    size = built_size(model)
    if min(size) < 1:  # which no timm model computes, and not every release refuses
        got, do = f"{size[0]} x {size[1]}", "check --model-arg img_size"
        raise failure("create model", name, expected="images of one pixel or more", got=got, do=do)
    if weights is not None:
        line = load_weights(model, weights, entry)
        if line and said is not None:
            said.append(line)
    return model.eval()


def check_name(name: str, operation: str) -> None:
    """Raise PTQError with near names if timm has no model of that name."""
    if name not in timm.list_models() and not timm.is_model(name):
        do = f"did you mean {near_names(name, timm.list_models(), 3)}?"
        raise failure(operation, repr(name), expected="a timm model name", got="an unknown name", do=do)


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """Return `key=value` of --model-arg as arguments; raises PTQError on what has no `=`."""
    found: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            do = "write --model-arg img_size=64"
            raise failure("read --model-arg", repr(argument), expected="key=value", got="no '='", do=do)
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # brackets nested too deep
            found[key] = value
    return found
