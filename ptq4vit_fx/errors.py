"""One error type and one sentence shape: what was done, on what, expected, got, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PTQError(ValueError):
    """Everything that this package raises on purpose: the message is one sentence for the person who reads it."""


class PTQWarning(UserWarning):
    """Something was left float, skipped or will run slowly: named, with the reason."""


def failure(operation: str, subject: str, *, expected: str, got: str, do: str) -> PTQError:
    """Build the error `operation: subject: expected ..., got ...; do ...` (a value: the caller raises it)."""
    return PTQError(f"{operation}: {subject}: expected {expected}, got {got}; {do}")


#: Characters of a value that a sentence quotes.
QUOTED = 60
#: Characters of what an exception says.
SAID = 300


def quoted(value: object) -> str:
    """Return a value as a sentence quotes it: one line, not long, no control characters."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


def said(error: BaseException) -> str:
    """Return what another library's exception says, on one line and not without end."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return text[:SAID] or type(error).__name__


def unknown_name(operation: str, subject: str, name: str, known: Iterable[str], *, besides: str = "") -> PTQError:
    """Build the error of a name that is none of the known ones; besides: what else would have been accepted."""
    names = list(known)
    expected, do = f"one of {', '.join(names)}{besides}", f"did you mean {near_names(name, names, 1)}?"
    return failure(operation, subject, expected=expected, got=quoted(name), do=do)


def near_names(name: str, known: Iterable[str], count: int = 5) -> str:
    """Return the known names that look most like `name`, comma-separated, or a few of them if none does."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.4) or names[:count]
    return ", ".join(close) if close else "(none)"


def some_names(names: Iterable[str], most: int = 3, separator: str = ", ") -> str:
    """Return the first few names, and how many more there are."""
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return separator.join(listed[:most]) + rest
