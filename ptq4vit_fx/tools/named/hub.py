"""The hub of Hugging Face, which models are downloaded from: its cache alone where it cannot be reached."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from ptq4vit_fx.errors import failure
from ptq4vit_fx.tools.named.model import CREATE


@contextmanager
def cache_where_unreachable(name: str) -> Iterator[None]:
    """Read the cache alone while this machine does not know the hub's address, which its client tries for a minute.

    What the client says of its own accord is kept from the terminal. Raises PTQError if the cache has not what is
    asked for; then the connection is what is missing, whatever the libraries in between make of it.
    """
    logger, before = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level, host = logger.level, None if before else _unknown_host()
    logger.setLevel(logging.CRITICAL)
    constants.HF_HUB_OFFLINE = before or host is not None
    try:
        yield
    except Exception as error:
        if host is None or not _is_missing(error):
            raise
        expected, got = "a model with its weights", f"no connection to {host}, and none in its cache"
        do = "connect, or pass --weights FILE with a local checkpoint"
        raise failure(CREATE, name, expected=expected, got=got, do=do) from error
    finally:
        constants.HF_HUB_OFFLINE = before
        logger.setLevel(level)


def _unknown_host() -> str | None:
    """Return the host of the hub if its name has no address here and no proxy would know one."""
    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or getproxies():
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return host
    return None


def _is_missing(error: BaseException | None) -> bool:
    """Return whether this or what led to it is that the cache has no such file."""
    while error is not None and not isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        error = error.__cause__ or error.__context__
    return error is not None
