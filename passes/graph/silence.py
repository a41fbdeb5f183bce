"""Nothing but our own sentences: the logs and warnings of torch while it traces are about its insides."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from ptq4vit_fx.errors import PTQWarning


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep torch's loggers and every warning but ours (PTQWarning, each once) quiet, and leave them as they were."""
    known = [name for name in logging.root.manager.loggerDict if name == "torch" or name.startswith("torch.")]
    loggers = [logging.getLogger(name) for name in {"torch", *known}]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with (
            warnings.catch_warnings(record=True) as said,
            contextlib.redirect_stderr(io.StringIO()),
        ):  # where it prints half a graph
            warnings.simplefilter("always")
            yield
        for text in dict.fromkeys(str(item.message) for item in said if issubclass(item.category, PTQWarning)):
            warnings.warn(text, PTQWarning, stacklevel=3)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
