"""Bytes as people write them, and whether what somebody hands in fits into memory, asked before the memory is."""

from __future__ import annotations

import re

import psutil

from ptq4vit_fx.errors import failure, quoted

UNITS = {"": 1, **{f"{letter}iB": 2 ** (10 * (n + 1)) for n, letter in enumerate("KMGT")}} | {
    f"{letter}B": 1000 ** (n + 1) for n, letter in enumerate("kMGT")
}


def bytes_of(size: object, operation: str, subject: str) -> int:
    """Return a number of bytes, which may be text with a unit, such as "8GiB"; raises PTQError on anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
    units: dict[str, int] = {name.lower(): factor for name, factor in UNITS.items()}
    if (
        match is None
        or match[2].lower() not in units
        or not (found := round(float(match[1]) * units[match[2].lower()]))
    ):
        expected, do = "bytes above 0, or text with a unit", "write 8GiB or 500MiB"
        raise failure(operation, subject, expected=expected, got=quoted(size), do=do)
    return found


FLOAT_BYTES = 4
#: An image is held by PyTorch, by NumPy and by the runtime.
COPIES = 3


def check_memory(operation: str, subject: str, size: int, *, what: str, do: str) -> None:
    """Raise PTQError if `size` bytes are more than what is free; what: that takes them, as `got` names it."""
    free = psutil.virtual_memory().available
    if size > free:
        expected = f"what fits into memory, {free / 2**30:.1f} GiB of which are free"
        raise failure(operation, subject, expected=expected, got=f"{size / 2**30:.1f} GiB for {what}", do=do)
