"""The example that a model is traced with: its tensors, and the parameters of forward that they are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq4vit_fx.errors import failure
from ptq4vit_fx.inputs.items import PIXELS
from ptq4vit_fx.inputs.tensors import ADD_BATCH, Inputs, as_input, by_name, is_shape

#: Names of what a loss reads. A model that can do without them is deployed without them.
LABELS = frozenset(["labels", "label", "targets", "target", "label_ids", "class_labels", "mask_labels"])


@dataclass(frozen=True)
class Example:
    """The inputs that a model is traced with; names: the parameters of forward that they are, None if by position."""

    tensors: Inputs
    names: tuple[str, ...] | None = None


def example_of(model: nn.Module, example_inputs: Any, operation: str = "prepare_fx") -> Example:
    """Return the inputs that `model` is traced with, float ones as float32.

    example_inputs: a tensor or array whose first dimension is the batch; a tuple of them, by position, the rest in a
    mapping behind them or not; or a mapping, by the names of forward's parameters. Entries that are None are left out,
    and so are labels that forward can do without. Raises PTQError on anything else, on a name that forward has not, and
    on inputs of different batches.
    """
    parameters, anything = _parameters(model)
    example_inputs = _unwrapped(example_inputs, list(parameters))
    given = by_name(example_inputs)
    if given is None:
        are_several = isinstance(example_inputs, (tuple, list)) and not is_shape(example_inputs)
        items = list(example_inputs) if are_several else [example_inputs]
        positions = [(f"example_inputs[{number}]", item) for number, item in enumerate(items)]
        named = _called_positions(positions, parameters, anything, operation) if len(items) > 1 else positions
        named = [("example_inputs", named[0][1])] if len(named) == 1 else named
        names = None
    else:
        named = _called_names(given, parameters, anything, operation)
        names = tuple(name for name, _ in named)
        named = [(f"example_inputs[{name!r}]", item) for name, item in named]
    tensors = tuple(as_input(item, operation, subject) for subject, item in named)
    _check_example(tensors, operation)
    return Example(tensors, names)


def _unwrapped(example_inputs: Any, parameters: list[str]) -> Any:
    """Return the inputs of (inputs, labels) and of ((inputs),); those of (tensors, mapping) by name."""
    if not isinstance(example_inputs, (tuple, list)) or not example_inputs:
        return example_inputs
    first, last = example_inputs[0], by_name(example_inputs[-1])
    if by_name(first) is not None or isinstance(first, (tuple, list)):
        return _unwrapped(first, parameters)
    if last and len(example_inputs) <= len(parameters):
        return dict(zip(parameters, example_inputs[:-1], strict=False)) | dict(last)
    return example_inputs


def first_example(model: nn.Module, item: Any, operation: str) -> Any:
    """Return the example that the first item of data makes, a few rows of it: what forward takes by name or has to."""
    parameters, _ = _parameters(model)
    needed = [p for p in parameters.values() if not _is_optional(p) and p.kind is not inspect.Parameter.KEYWORD_ONLY]
    given = by_name(item)
    if given is not None:
        if PIXELS in given and PIXELS not in parameters and len(needed) == 1 and needed[0].name not in given:
            return _some_rows([given[PIXELS]], operation)[0]
        known = {name: value for name, value in given.items() if name in parameters and value is not None}
        taken = {n: value for n, value in known.items() if n not in LABELS or not _is_optional(parameters[n])} or given
        return dict(zip(taken, _some_rows(taken.values(), operation), strict=True))
    if not isinstance(item, (tuple, list)) or not item:
        return _some_rows([item], operation)[0]
    if by_name(item[0]) is not None or isinstance(item[0], (tuple, list)):
        return first_example(model, item[0], operation)
    return _some_rows(item[: max(1, len(needed))], operation)


def _some_rows(values: Iterable[Any], operation: str) -> Inputs:
    """Return one row of each; or all channels of what may be an image without a batch, so that this is found out."""
    inputs = tuple(as_input(value, operation, "the first item of data") for value in values)
    rows = 1 if any(x.ndim > 3 for x in inputs) else 4
    return tuple(x[:rows] for x in inputs)


def without_labels(model: nn.Module, example: Example) -> Example | None:
    """Return an example without what may be the labels of a batch, given by position; None if there is none."""
    *inputs, last = example.tensors
    positions = list(_parameters(model)[0].values())
    if example.names or not inputs or not _are_labels(last) or len(inputs) >= len(positions):
        return None
    return Example(tuple(inputs)) if _is_optional(positions[len(inputs)]) else None


def check_batch_dimension(model: nn.Module, example: Example) -> None:
    """Raise PTQError if the model, which does not take the example as it is, takes it with one more dimension."""
    lowest = min(x.ndim for x in example.tensors)
    if lowest > 3:
        return
    device = next((p.device for p in model.parameters()), example.tensors[0].device)
    inputs = [x[None].to(device) for x in example.tensors]
    by_position, named = (inputs, {}) if example.names is None else ([], dict(zip(example.names, inputs, strict=True)))
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval().float()(*by_position, **named)
    except Exception:  # noqa: BLE001 - whatever it is, a batch dimension is not what is missing
        return
    got = ", ".join(str(tuple(x.shape)) for x in example.tensors)
    expected = "a batch, the first dimension of which counts the images"
    raise failure("prepare_fx", "example_inputs", expected=expected, got=got, do=ADD_BATCH)


def _parameters(model: nn.Module) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters of a forward that have a name, and whether it takes any others."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a forward that is not Python's
        return {}, True
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind not in kinds}
    return named, len(named) < len(parameters)


def _called_names(
    given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], anything: bool, operation: str
) -> list[tuple[str, Any]]:
    """Return the entries of an example that forward is called with, in the order of its parameters."""
    taken = {name: value for name, value in given.items() if value is not None}
    spare = {name for name in taken if name in LABELS and _is_optional(parameters.get(name))}
    taken = {name: value for name, value in taken.items() if name not in spare}
    unknown = [name for name in taken if name not in parameters]
    if not taken or (unknown and not anything):
        raise failure(
            operation,
            "example_inputs",
            expected=f"names of forward's parameters: {', '.join(parameters)}",
            got=", ".join(map(str, unknown)) or f"no tensor but {', '.join(given) or 'nothing at all'}",
            do="name the entries after the parameters that they are",
        )
    return [(name, taken[name]) for name in (*(n for n in parameters if n in taken), *unknown)]


def _is_optional(parameter: inspect.Parameter | None) -> bool:
    return parameter is None or parameter.default is not inspect.Parameter.empty


def _called_positions(
    items: list[tuple[str, Any]], parameters: Mapping[str, inspect.Parameter], anything: bool, operation: str
) -> list[tuple[str, Any]]:
    """Return the items that forward is called with: without the labels of a batch, and without None at the end."""
    while len(items) > 1 and (items[-1][1] is None or by_name(items[-1][1]) == {}):
        items = items[:-1]
    keyword = inspect.Parameter.KEYWORD_ONLY
    positions = [parameter for parameter in parameters.values() if parameter.kind is not keyword]
    last = items[-1][1]
    taker = positions[len(items) - 1] if len(items) <= len(positions) else None
    is_label = taker is not None and taker.name in LABELS and _is_optional(taker)
    if len(items) > 1 and (is_label or (len(items) == len(positions) + 1 and not anything and _are_labels(last))):
        return items[:-1]
    if len(items) > len(positions) and not anything:
        raise failure(
            operation,
            "example_inputs",
            expected=f"at most {len(positions)} tensors, as forward takes: {', '.join(p.name for p in positions)}",
            got=str(len(items)),
            do="pass the inputs alone; images of one batch are one tensor, torch.stack(images)",
        )
    return items


def _are_labels(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1 and "int" in str(value.dtype)


def _check_example(tensors: Inputs, operation: str) -> None:
    described = "; ".join(f"shape {tuple(x.shape)}, {x.dtype}" for x in tensors) or "nothing"
    do = "pass torch.randn(1, 3, 224, 224), for example"
    if len(tensors) == 1 and tensors[0].ndim < 2:
        expected, got = "a batch: two dimensions or more, the batch first", described
    elif len({len(x) for x in tensors}) > 1:
        expected, got = "inputs of the same batch size, the first dimension of each", described
        do = "give every input one row per image"
    elif not tensors or not tensors[0].numel():
        expected, got = "one image or more", described
    else:
        return
    raise failure(operation, "example_inputs", expected=expected, got=got, do=do)
