"""Image batches out of whatever a user has: a tensor, a list of tensors, a DataLoader, an endless stream."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.data.handed_in import Preparation, as_pixels
from ptq4vit_fx.data.preprocessing import PREPROCESSING
from ptq4vit_fx.errors import PTQError, failure, warn
from ptq4vit_fx.inputs.items import Input, fitted, model_inputs
from ptq4vit_fx.inputs.tensors import Inputs, as_input, by_name

#: Images per forward and backward when the data is one tensor.
BATCH_SIZE = 8

#: Where a traced GraphModule notes the batch size of the example, if its model takes no other.
FIXED_BATCH = "ptq4vit_fixed_batch"

#: So many images are read of an iterable that is not in memory anyway; calibration needs far fewer.
MOST_IMAGES = 1024

#: So many items without an image in a row end the reading of an iterable.
MOST_EMPTY = 1000

#: Reading that takes longer than so many seconds is shown.
SHOWN_AFTER = 2.0


def batches_for(
    graph_module: GraphModule, data: Any, operation: str, *, images: int | None = None, progress: bool = False
) -> list[Inputs]:
    """Return batches of the inputs of a traced model, in their order, float ones as float32; see `batches_of`.

    Pictures, by path or as objects, are prepared as the model's own configuration says (`data/handed_in.py`).

    Shapes are part of a traced graph (patches, windows, position embeddings), so a model that takes any image size
    takes one size after tracing.
    """
    wanted, fixed = model_inputs(graph_module), graph_module.meta.get(FIXED_BATCH)
    data = pictures_for(graph_module, data, operation, images=images)
    return batches_of(wanted, data, operation, images=images, fixed=fixed, progress=progress)


def pictures_for(
    graph_module: GraphModule,
    data: Any,
    operation: str,
    *,
    images: int | None = None,
    transform: Callable[[Any], Any] | None = None,
) -> Any:
    """Return the pixels that a traced model takes of pictures, at the size of its example; other data as they are."""
    wanted = model_inputs(graph_module)
    if len(wanted) != 1 or not wanted[0].dtype.is_floating_point or len(wanted[0].shape) != 3:
        return data if transform is None else as_pixels(data, Preparation(operation, transform), images)
    first, config = wanted[0], graph_module.meta.get(PREPROCESSING)
    known = (
        None if config is None or config["input_size"][0] != first.shape[0] else config | {"input_size": first.shape}
    )
    return as_pixels(data, Preparation(operation, transform, known), images)


def batches_of(
    wanted: Sequence[Input],
    data: Any,
    operation: str,
    *,
    images: int | None = None,
    fixed: int | None = None,
    progress: bool = False,
) -> list[Inputs]:
    """Return batches of these inputs, in their order.

    data: a tensor or array of images, a mapping of such, or an iterable of batches, which `fitted` describes. images:
    read that many at most; None: all of a tensor, list or tuple, MOST_IMAGES of any other iterable, with a warning
    (PTQWarning) if there are more. fixed: the only size of a batch that the model takes. progress: show how many were
    read once that takes time. Raises PTQError on data without images, with NaN or infinity, or that is not like
    `wanted`.
    """
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
        do = "leave it out for all of a tensor"
        raise failure(operation, "images", expected="an integer of 1 or more", got=repr(images), do=do)
    items = _items(data, wanted, operation)
    most = images if images is not None or isinstance(items, list) else MOST_IMAGES
    read: list[Inputs] = []
    count = 0
    with _shown(progress) as show:
        for batch in _batches(items, wanted, operation):
            room = len(batch[0]) if most is None else most - count
            cut = room < len(batch[0])
            if cut and images is None:
                _warn_of_more(operation, count + room)
            if room:
                read.append(tuple(x[:room] for x in batch))
                count += len(read[-1][0])
                show(count)
            if cut or count == images:
                break
    if not read:
        raise _nothing(data, operation)
    return read if fixed is None else _of_size(read, fixed, operation)


def _of_size(batches: list[Inputs], size: int, operation: str) -> list[Inputs]:
    """Return the same rows in batches of the only size that the model takes; warns (PTQWarning) of rows left over."""
    columns = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    rows = len(columns[0])
    if rows < size:
        do = "pass that many, or call prepare_fx with an example of one image"
        raise failure(operation, "data", expected=f"the {size} images of a batch", got=str(rows), do=do)
    if rows % size:
        text = f"{operation}: data: the last {rows % size} images are left out: the model takes batches of {size} only"
        warn(text)
    whole = rows - rows % size
    return list(zip(*(torch.split(x[:whole], size) for x in columns), strict=True))


def example_for(graph_module: GraphModule, example_inputs: Any, operation: str) -> Inputs:
    """Return an example of a traced model's inputs; raises PTQError if it is not like that of prepare_fx."""
    wanted = model_inputs(graph_module)
    if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == len(wanted) == 1:
        (example_inputs,) = example_inputs
    batch = fitted(example_inputs, wanted, operation, "example_inputs")
    if not len(batch[0]):
        got, do = str(tuple(batch[0].shape)), "pass the example of prepare_fx"
        raise failure(operation, "example_inputs", expected="one image or more", got=got, do=do)
    return batch


def first_item(data: Any, operation: str) -> tuple[Any, Any]:
    """Return the first item of data, all of it if that is one tensor, array or mapping, and data that still has it."""
    if isinstance(data, Tensor) or hasattr(data, "__array__") or by_name(data) is not None:
        return data, data
    if isinstance(data, (tuple, list)) and data:
        return data[0], data
    items = _read(iter(_items(data, (), operation)), operation)
    for item in items:
        return item, itertools.chain([item], items)
    raise _nothing(data, operation)


def _items(data: Any, wanted: Sequence[Input], operation: str) -> Iterable[Any]:
    """Return the items of data, a list if they are in memory; what holds all images at once is split into batches."""
    whole = by_name(data) is not None or (len(wanted) > 1 and _are_whole(data, len(wanted)))
    if whole:
        return list(zip(*(torch.split(x, BATCH_SIZE) for x in fitted(data, wanted, operation, "data")), strict=True))
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        return list(torch.split(as_input(data, operation, "data"), BATCH_SIZE))
    if isinstance(data, (tuple, list)):
        return list(data)
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        as_input(data, operation, "data")  # says what it is
    iterable: Iterable[Any] = data
    return iterable


def _are_whole(data: Any, count: int) -> bool:
    return (
        isinstance(data, (tuple, list))
        and len(data) == count
        and all(isinstance(x, (Tensor, np.ndarray)) for x in data)
    )


def _read(items: Iterator[Any], operation: str) -> Iterator[Any]:
    """Yield items; an exception of the user's own loader becomes a PTQError that says which batch it was."""
    for number in range(2**63):
        try:
            item = next(items)
        except StopIteration:
            return
        except PTQError:
            raise
        except Exception as error:
            reason = [line for line in str(error).splitlines() if line.strip()] or [""]
            got = f"{type(error).__name__}: {reason[-1].strip()}"
            do = "mend the data set or its loader"
            raise failure(operation, f"reading batch {number}", expected="a batch", got=got, do=do) from error
        yield item


@contextlib.contextmanager
def _shown(progress: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that shows how many images were read, once reading takes longer than SHOWN_AFTER seconds."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        status = None

        def show(count: int) -> None:
            nonlocal status
            if progress and time.monotonic() - started > SHOWN_AFTER:
                status = status or stack.enter_context(Console().status("read images"))
                status.update(f"read images: {count}")

        yield show


def _warn_of_more(operation: str, count: int) -> None:
    warn(f"{operation}: data: the first {count} images of an iterable were read, it has more; images= sets the number")


def _nothing(data: Any, operation: str) -> PTQError:
    do = "pass a tensor (images, channels, height, width) or an iterable of such batches"
    if isinstance(data, Iterator):
        do = "an iterator can be read once: pass a list of batches or a DataLoader"
    return failure(operation, "data", expected="one image or more", got="none", do=do)


def _batches(items: Iterable[Any], wanted: Sequence[Input], operation: str) -> Iterator[Inputs]:
    """Yield the items that hold images, fitted and checked; stop after MOST_EMPTY in a row that hold none."""
    empty = 0
    for number, item in enumerate(_read(iter(items), operation)):
        batch = fitted(item, wanted, operation, f"batch {number}")
        _check_finite(batch, operation, f"batch {number}")
        empty = 0 if len(batch[0]) else empty + 1
        if empty > MOST_EMPTY:
            return
        if not empty:
            yield batch


def _check_finite(batch: Inputs, operation: str, subject: str) -> None:
    for x in batch:
        finite = torch.isfinite(x).reshape(len(x), -1).all(1) if x.numel() else torch.ones(1)
        if not finite.all():
            raise failure(
                operation,
                f"{subject}, image {int((~finite).nonzero()[0])}",
                expected="finite pixels",
                got="NaN or infinity",
                do="check the preprocessing or leave that image out",
            )
