"""Image batches out of whatever a user has: a tensor, a list of tensors, a DataLoader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure

#: Images per forward and backward when the data is one tensor.
BATCH_SIZE = 8


#: The inputs of one forward: tensors whose first dimension is the batch.
Inputs = tuple[Tensor, ...]


def example_tensors(example_inputs: Tensor | Sequence[Tensor], operation: str = "prepare_fx") -> Inputs:
    """Return the inputs of one forward. Raises PTQError unless a single one is an image batch, several one batch."""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4 and inputs[0].is_floating_point():
        return inputs
    are_tensors = all(isinstance(x, Tensor) and x.ndim for x in inputs)
    if len(inputs) > 1 and are_tensors and len({len(x) for x in inputs}) == 1:
        return inputs
    described = [f"shape {tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
    raise failure(
        operation,
        "example_inputs",
        expected="a float image batch (batch, channels, height, width), or a tuple of tensors of the same batch size",
        got="; ".join(described) or "nothing",
        do="pass torch.randn(1, 3, 224, 224), for example",
    )


def input_batches(data: Tensor | Iterable[Any], count: int = 1) -> list[Inputs]:
    """Return the batches of a tensor, or of an iterable of tensors or of tuples that start with `count` tensors.

    What follows these tensors (labels) is ignored. With count 1 they are image batches. Raises PTQError if there is
    none, if an item is something else, or if a tensor holds NaN or infinity.
    """
    if isinstance(data, Tensor):
        items: list[Any] = list(torch.split(data, BATCH_SIZE)) if data.ndim else [data]
    else:
        items = list(data)
    batches = [tuple(map(_as_input, _tensors_of(item, count))) for item in items]
    batches = [batch for batch in batches if batch[0].ndim == 0 or len(batch[0])]
    if not batches:
        raise failure(
            "calibrate",
            "data",
            expected="one image or more",
            got="none",
            do="pass a tensor (images, channels, height, width) or an iterable of such batches",
        )
    for number, batch in enumerate(batches):
        _check(number, batch)
    return batches


def _as_input(x: Tensor) -> Tensor:
    return x.detach().float() if x.is_floating_point() or x.ndim == 4 else x.detach()


def _check(number: int, batch: Inputs) -> None:
    if len(batch) == 1 and batch[0].ndim != 4:
        raise failure(
            "calibrate",
            f"batch {number}",
            expected="shape (images, channels, height, width)",
            got=str(tuple(batch[0].shape)),
            do="add the batch dimension" if batch[0].ndim == 3 else "pass image batches",
        )
    for x in batch:
        finite = torch.isfinite(x).flatten(1).all(1)
        if not finite.all():
            raise failure(
                "calibrate",
                f"batch {number}, image {int((~finite).nonzero()[0])}",
                expected="finite pixels",
                got="NaN or infinity",
                do="check the preprocessing or leave that image out",
            )


def _tensors_of(item: Any, count: int) -> Inputs:
    tensors = tuple(item[:count]) if isinstance(item, (tuple, list)) else (item,)
    if len(tensors) == count and all(isinstance(x, Tensor) for x in tensors):
        return tensors
    raise failure(
        "calibrate",
        "an item of data",
        expected=f"a tuple that starts with {count} tensors"
        if count > 1
        else "a tensor, or a tuple that starts with one",
        got=" and ".join(type(x).__name__ for x in tensors) or "nothing",
        do="pass a tensor or a DataLoader of images",
    )


def batches_for(graph_module: GraphModule, data: Tensor | Iterable[Any], operation: str) -> list[Inputs]:
    """Return `input_batches` of a traced model. Raises PTQError if their size is not the one that it was prepared for.

    Shapes are part of a traced graph (patches, windows, position embeddings): a model that takes any image size takes
    one size after tracing.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    batches = input_batches(data, len(placeholders))
    wanted = [tuple(node.meta["tensor_meta"].shape[1:]) for node in placeholders]
    for number, batch in enumerate(batches):
        for node, x, shape in zip(placeholders, batch, wanted, strict=True):
            if tuple(x.shape[1:]) != shape:
                raise failure(
                    operation,
                    f"batch {number}, input {node.name}",
                    expected=f"shape (batch, {', '.join(map(str, shape))}), the size that the model was prepared for",
                    got=str(tuple(x.shape)),
                    do="resize the images, or call prepare_fx with an example of that size",
                )
    return batches
