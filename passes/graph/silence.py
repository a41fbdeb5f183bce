"""Nothing but our own sentences: the logs and warnings of torch while it traces are about its insides."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ptq4vit_fx.errors import PTQWarning, warn
from ptq4vit_fx.passes.graph.exclusive import exclusive


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep torch's loggers and every warning but ours (PTQWarning, each once) quiet, and leave them as they were.

    What other threads say meanwhile is heard, torch's loggers apart.
    """
    said: list[str] = []
    with (
        exclusive(),  # filters and streams are those of the process
        quiet_loggers(_torch_loggers(), logging.CRITICAL + 1),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(_Muted(sys.stderr)),  # where it prints half a graph
    ):
        warnings.simplefilter("always")
        own, show = threading.get_ident(), warnings.showwarning

        def showwarning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if threading.get_ident() != own:
                show(message, category, *where, **more)
            elif issubclass(category, PTQWarning):
                said.append(str(message))

        warnings.showwarning = showwarning
        yield
    for text in dict.fromkeys(said):
        warn(text)


@contextlib.contextmanager
def muted_stdout() -> Iterator[None]:
    """Keep this thread from writing to sys.stdout."""
    with exclusive(), contextlib.redirect_stdout(_Muted(sys.stdout)):
        yield


@contextlib.contextmanager
def quiet_loggers(names: Sequence[str], level: int) -> Iterator[None]:
    """Let loggers say only what is of this level."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


def _torch_loggers() -> list[str]:
    known = list(logging.root.manager.loggerDict)
    return ["torch", *(name for name in known if name.startswith("torch."))]


class _Muted(io.TextIOBase):
    """A stream that takes what its own thread writes, and hands on what others do."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._own = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._own or self._stream is None:
            return len(text)
        return int(self._stream.write(text))

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
