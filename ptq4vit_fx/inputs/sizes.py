"""Whether what somebody hands in fits into memory, asked before the memory is."""

from __future__ import annotations

import psutil

from ptq4vit_fx.errors import failure

FLOAT_BYTES = 4
#: An image is held by PyTorch, by NumPy and by the runtime.
COPIES = 3


def check_memory(operation: str, subject: str, size: int, *, what: str, do: str) -> None:
    """Raise PTQError if `size` bytes are more than what is free; what: that takes them, as `got` names it."""
    free = psutil.virtual_memory().available
    if size > free:
        expected = f"what fits into memory, {free / 2**30:.1f} GiB of which are free"
        raise failure(operation, subject, expected=expected, got=f"{size / 2**30:.1f} GiB for {what}", do=do)
