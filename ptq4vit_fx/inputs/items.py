"""One item of data as the inputs of a traced model: the same names, shapes and dtypes as those of its example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure
from ptq4vit_fx.inputs.tensors import ADD_BATCH, Inputs, as_input, by_name

#: Where the node of an input keeps the name of the parameter of the model's forward that it is.
PARAMETER = "ptq4vit_parameter"
#: What processors of Hugging Face call images; it means the only input of a model that calls it otherwise.
PIXELS = "pixel_values"


@dataclass(frozen=True)
class Input:
    """An input of a traced model: its node, the parameter that it was, the shape of one image's part, its dtype."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"shape (batch{''.join(f', {size}' for size in self.shape)})"


def model_inputs(graph_module: GraphModule) -> tuple[Input, ...]:
    """Return the inputs of a traced model, as its example had them."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    metas = [node.meta["tensor_meta"] for node in nodes]
    return tuple(
        Input(node.name, node.meta[PARAMETER], tuple(meta.shape[1:]), meta.dtype)
        for node, meta in zip(nodes, metas, strict=True)
    )


def fitted(item: Any, wanted: Sequence[Input], operation: str, subject: str) -> Inputs:
    """Return an item of data as the inputs of a traced model, in their order and dtypes.

    item: a tensor or array; a tuple that starts with as many as the model has inputs, or whose first element is such
    a tuple or mapping (labels follow); or a mapping that has them by name. Raises PTQError, one sentence, on an item
    that lacks an input, or whose shape or dtype is not the example's.
    """
    values = _values(item, wanted, operation, subject)
    fits = []
    for entry, value in zip(wanted, values, strict=True):
        where = f"{subject}, input {entry.name}"
        x = as_input(value, operation, where)
        _check_shape(x, entry, operation, where)
        fits.append(_as_dtype(x, entry.dtype, operation, where))
    if len({len(x) for x in fits}) > 1:
        got = ", ".join(f"{len(x)} of {entry.name}" for entry, x in zip(wanted, fits, strict=True))
        raise failure(operation, subject, expected="as many rows of every input", got=got, do="check the loader")
    return tuple(fits)


def _values(item: Any, wanted: Sequence[Input], operation: str, subject: str) -> Sequence[Any]:
    """Return what an item has for each input, whatever it is."""
    given = by_name(item)
    if given is not None:
        return _entries(given, wanted, operation, subject)
    if isinstance(item, (tuple, list)) and item:
        if by_name(item[0]) is not None or (isinstance(item[0], (tuple, list)) and len(item[0]) == len(wanted)):
            return _values(item[0], wanted, operation, subject)
        by_names = by_name(item[-1]) or {}
        if any(entry.parameter in by_names for entry in wanted[len(item) - 1 :]):  # as a call has them
            by_position = dict(zip((entry.parameter for entry in wanted), item[:-1], strict=False))
            return _entries(by_position | dict(by_names), wanted, operation, subject)
        if len(item) >= len(wanted):
            _check_not_single(item, wanted, operation, subject)
            return item[: len(wanted)]
    elif len(wanted) == 1:
        return [item]
    got = " and ".join(type(x).__name__ for x in item) if isinstance(item, (tuple, list)) else type(item).__name__
    raise failure(
        operation,
        f"an item of data, {subject}",
        expected=f"a tuple that starts with {len(wanted)} tensors, or a mapping with "
        f"{', '.join(entry.parameter for entry in wanted)}",
        got=got or "nothing",
        do="give every input in every item",
    )


def _entries(given: Mapping[str, Any], wanted: Sequence[Input], operation: str, subject: str) -> list[Any]:
    found = [entry.name if entry.name in given else entry.parameter for entry in wanted]
    if len(wanted) == 1 and found[0] not in given and PIXELS in given:
        found = [PIXELS]
    missing = [entry.parameter for entry, key in zip(wanted, found, strict=True) if given.get(key) is None]
    if missing:
        raise failure(
            operation,
            subject,
            expected=f"an entry for every input of the model: {', '.join(entry.parameter for entry in wanted)}",
            got=", ".join(map(str, given)) or "an empty mapping",
            do=f"name the entry of the images {missing[0]!r}" if len(wanted) == 1 else f"add {', '.join(missing)}",
        )
    return [given[key] for key in found]


def _check_not_single(item: Sequence[Any], wanted: Sequence[Input], operation: str, subject: str) -> None:
    """Raise PTQError on single images beside each other, or one image and its label, where a batch is expected."""
    if not isinstance(item[0], (Tensor, np.ndarray)) or tuple(item[0].shape) != wanted[0].shape or not wanted[0].shape:
        return
    images = [x for x in item if isinstance(x, (Tensor, np.ndarray)) and tuple(x.shape) == wanted[0].shape]
    alone = len(images) == 1
    raise failure(
        operation,
        subject,
        expected=str(wanted[0]),
        got=f"{len(images)} single image{'s' * (not alone)} of shape {wanted[0].shape}",
        do="read a data set through torch.utils.data.DataLoader(dataset, batch_size=8)"
        if alone
        else "put them together: torch.stack(images)",
    )


def _check_shape(x: Tensor, wanted: Input, operation: str, subject: str) -> None:
    if tuple(x.shape[1:]) == wanted.shape:
        return
    do = "resize the images, or call prepare_fx with an example of that size"
    if tuple(x.shape) == wanted.shape:
        do = ADD_BATCH
    elif tuple(x.shape) == (*wanted.shape[1:], *wanted.shape[:1]):
        do = "put the channels first and add the batch dimension: x.permute(2, 0, 1)[None]"
    elif x.ndim != len(wanted.shape) + 1:
        do = "pass the same kind of input as the example"
    elif x.ndim == 4 and tuple(x.shape[1:]) == (*wanted.shape[1:], wanted.shape[0]):
        do = "put the channels first: x.permute(0, 3, 1, 2)"
    elif x.ndim == 4 and x.shape[2:] == wanted.shape[1:]:
        do = f"pass images of {wanted.shape[0]} channels, as the example's"
    expected = f"{wanted}, the size that the model was prepared for"
    raise failure(operation, subject, expected=expected, got=str(tuple(x.shape)), do=do)


def _as_dtype(x: Tensor, dtype: torch.dtype, operation: str, subject: str) -> Tensor:
    """Return x in the dtype of the example where every value stays what it is."""
    if x.dtype == dtype:
        return x
    if not dtype.is_floating_point and not x.is_floating_point():
        cast = x.to(dtype)
        if torch.equal(cast.to(x.dtype), x):
            return cast
        do = f"pass values that {dtype} holds"
    elif dtype.is_floating_point:
        do = "preprocess them as the example was (divide by 255, normalize), or pass x.float() if values are right"
    else:
        do = f"pass x.to({dtype})"
    raise failure(operation, subject, expected=f"{dtype}, as in the example", got=str(x.dtype), do=do)
