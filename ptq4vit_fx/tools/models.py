"""Models of timm by name and arguments, for the command line."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn

from ptq4vit_fx.data.preprocessing import built_size
from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.tools.checkpoint_files import only_weights


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
    size = built_size(model)
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
