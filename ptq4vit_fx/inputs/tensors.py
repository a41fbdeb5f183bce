"""What a user hands in as a tensor: tensors and arrays of any kind, made plain; mappings by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq4vit_fx.errors import PTQError, failure

#: The inputs of one forward: tensors whose first dimension is the batch.
Inputs = tuple[Tensor, ...]

#: What to do about an image that is no batch.
ADD_BATCH = "add the batch dimension: x[None] for one image, torch.stack(images) for several"


def as_input(value: Any, operation: str, subject: str) -> Tensor:
    """Return a plain tensor without gradient, float32 where it is a float. Raises PTQError on what is no tensor."""
    if not isinstance(value, Tensor) and hasattr(value, "__array__") and not type(value).__module__.startswith("PIL"):
        try:
            value = torch.from_numpy(np.array(value))
        except (TypeError, ValueError) as error:
            do = "pass an array of numbers"
            raise failure(operation, subject, expected="a tensor", got=str(error).splitlines()[0], do=do) from error
    if not isinstance(value, Tensor):
        raise _no_tensor(value, operation, subject)
    what, do = _unusual(value)
    if what:
        raise failure(operation, subject, expected="a dense tensor of numbers", got=what, do=do)
    x = value.detach().as_subclass(Tensor)
    if x.ndim == 0:
        do = "give it the batch as first dimension"
        raise failure(operation, subject, expected="a tensor whose first dimension is the batch", got="a scalar", do=do)
    x = x.clone() if x.is_inference() else x.resolve_neg()
    return x.float() if x.is_floating_point() else x


def by_name(value: Any) -> Mapping[str, Any] | None:
    """Return a mapping, or what behaves like one (a processor's output), by name; None for anything else."""
    if isinstance(value, Mapping):
        return value
    if hasattr(value, "keys") and hasattr(value, "__getitem__"):
        return {name: value[name] for name in value.keys()}  # noqa: SIM118 - not a mapping
    return None


def is_shape(value: Any) -> bool:
    """Return whether this is a shape of something, not something."""
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(size, int) for size in value)


def _unusual(x: Tensor) -> tuple[str, str]:
    if x.is_nested:
        return "a nested tensor", "pad it: torch.nested.to_padded_tensor(x, 0.0)"
    if x.layout is not torch.strided:
        return f"a tensor of layout {x.layout}", "pass x.to_dense()"
    if x.is_quantized:
        return "a quantized tensor", "pass x.dequantize()"
    if x.is_complex():
        return f"{x.dtype}", "pass real and imaginary part as channels, torch.view_as_real(x)"
    if x.is_meta:
        return "a meta tensor, which has no values", "pass images"
    return "", ""


def _no_tensor(value: Any, operation: str, subject: str) -> PTQError:
    name = type(value).__name__
    expected, do = "a tensor whose first dimension is the batch", "pass a tensor of images, or batches of them"
    if "example" in subject:
        do = "pass torch.randn(1, 3, 224, 224), for example"
    if type(value).__module__.startswith("PIL"):
        name, do = "an image of pillow", "preprocess it as the model expects: transform(image)[None]"
    elif is_shape(value):
        name, do = f"a shape, {tuple(value)}", "pass a tensor of that shape: torch.randn(shape)"
    elif isinstance(value, (tuple, list)) and value and all(isinstance(x, (str, bytes)) for x in value):
        name, do = f"{type(value).__name__} of {len(value)} texts", "put the images first, or pass a mapping by name"
    elif isinstance(value, (tuple, list)):
        name = f"{type(value).__name__} of {len(value)}"
        do = "put images of one size together: torch.stack(images)" if value else "pass one image or more"
    elif isinstance(value, (str, bytes)) or hasattr(value, "__fspath__"):
        name, do = repr(value), "read and preprocess the images first, or use the command line with --data FOLDER"
    elif value is None:
        name = "None"
    elif by_name(value) is not None:
        do = "pass the tensors that are in it"
        if "example_inputs[" in subject:  # forward itself takes a mapping
            do = "wrap the model in a module whose forward has a parameter for each tensor in it, and pass these"
    elif hasattr(value, "__iter__") or hasattr(value, "__next__"):
        do = "pass one batch of it: next(iter(loader))"
    elif callable(value):
        do = "pass what it returns"
    return failure(operation, subject, expected=expected, got=name, do=do)
