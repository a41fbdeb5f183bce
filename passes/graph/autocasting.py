"""Autocast inside of a forward: what is quantized computes in float32, so it is left out, and said."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ptq4vit_fx.errors import some_names, warn
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.places import frames_here, line_in


@contextlib.contextmanager
def autocast_left_out() -> Iterator[dict[str, None]]:
    """Let this thread switch autocast on without effect; give the lines that do, which fill while forwards run."""
    own, lines = threading.get_ident(), dict[str, None]()
    enter: Callable[[Any], Any] = torch.autocast.__enter__
    switch: Callable[..., None] = torch.set_autocast_enabled

    def note(dtype: torch.dtype) -> None:
        lines[f"{line_in(frames_here()) or 'a decorator of its forward'} ({dtype})"] = None

    def entered(self: Any) -> Any:
        if threading.get_ident() != own or not self._enabled:
            return enter(self)
        note(self.fast_dtype)
        self._enabled = False
        try:
            return enter(self)
        finally:
            self._enabled = True

    def switched(*arguments: Any) -> None:  # of a device, or of CUDA
        if threading.get_ident() == own and arguments[-1]:
            device = arguments[0] if len(arguments) > 1 else "cuda"
            note(torch.get_autocast_dtype(device))
            arguments = (*arguments[:-1], False)
        switch(*arguments)

    with exclusive():
        setattr(torch.autocast, "__enter__", entered)  # noqa: B010 - a method, to mypy
        setattr(torch, "set_autocast_enabled", switched)  # noqa: B010
        try:
            yield lines
        finally:
            setattr(torch.autocast, "__enter__", enter)  # noqa: B010
            setattr(torch, "set_autocast_enabled", switch)  # noqa: B010


def warn_of_autocast(model: nn.Module, lines: dict[str, None]) -> None:
    """Say that autocast is left out (PTQWarning), if there was any."""
    if lines:
        warn(
            f"{type(model).__name__} switches torch.autocast on in {some_names(lines)}: "
            "it is quantized from float32, as it computes without"
        )
