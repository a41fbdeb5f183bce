"""Torch's global state: every entry point computes the same whatever its caller has switched on, and leaves it so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

#: Devices that autocast is switched on for.
AUTOCAST = ("cpu", "cuda")


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the types that operands have: integer codes above 2048 or 256 are none in float16 or bfloat16."""
    with contextlib.ExitStack() as stack:
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def independent_of_caller() -> Iterator[None]:
    """Compute with gradients where they are asked for, in float32, on the CPU where no device is named.

    A decorator too. What holds around it (no_grad, inference_mode, autocast, a default dtype or device) holds again
    behind it, also after an exception.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_autocast())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype is not torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield
