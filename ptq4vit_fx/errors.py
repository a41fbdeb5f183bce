"""One error type and one sentence shape: what was done, on what, expected, got, what to do."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

#: Colours of terminals, which runtimes write into what they say.
ANSI = re.compile(r"\x1b\[[0-9;]*m")
#: Characters of a sentence of somebody else, and of one of ours; both are cut in their middle: files hold long names.
LONGEST_REASON, LONGEST = 400, 4000


class PTQError(ValueError):
    """Everything that this package raises on purpose: the message is one sentence for the person who reads it."""

    def __init__(self, *words: object) -> None:
        super().__init__(*map(_sentence, words))


class PTQWarning(UserWarning):
    """Something was left float, skipped or will run slowly: named, with the reason."""

    def __init__(self, *words: object) -> None:
        super().__init__(*map(_sentence, words))


def warn(message: str) -> None:
    """Warn (PTQWarning) of a line of the user's: the innermost one that is none of this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in ("ptq4vit_fx", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, PTQWarning, stacklevel=level)


def printable(text: str, keep: str = "") -> str:
    """Return a text that a terminal shows and does not obey: whatever Python's repr escapes is escaped here too.

    These are control characters, marks that turn the direction of text, line separators and the bytes of names that are
    no UTF-8. keep: characters that stay, such as the ends of lines.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def _sentence(words: object) -> str:
    text = printable(str(words))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def reason_of(error: BaseException) -> str:
    """Return `Type: what it says` of what a library raised, on one line, without colours, cut in its middle.

    Of an error that was raised from another it is the first one, which knows what happened; the text of a worker's
    traceback, which pools of processes hang on an error as its cause, is none.
    """
    while error.__cause__ is not None and not type(error.__cause__).__name__.endswith("RemoteTraceback"):
        error = error.__cause__
    text = " ".join(ANSI.sub("", str(error)).split())
    if len(text) > LONGEST_REASON:
        text = f"{text[: LONGEST_REASON // 3]} ... {text[-2 * LONGEST_REASON // 3 :]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def foreign(operation: str, subject: str, *, expected: str, do: str) -> Iterator[None]:
    """Turn whatever is raised inside, where what somebody else made is read, into a PTQError that names it.

    A file that was cut, forged or written by another program lets its readers raise anything. A PTQError that names the
    subject passes; in front of another one it is named.
    """
    try:
        yield
    except PTQError as error:
        if printable(subject) in str(error):
            raise
        raise PTQError(f"{operation}: {subject}: {error}") from error
    except Exception as error:
        raise failure(operation, subject, expected=expected, got=reason_of(error), do=do) from error


def failure(operation: str, subject: str, *, expected: str, got: str, do: str) -> PTQError:
    """Build the error `operation: subject: expected ..., got ...; do ...` (a value: the caller raises it)."""
    return PTQError(f"{operation}: {subject}: expected {expected}, got {got}; {do}")


def check_extra(operation: str, subject: str, extra: str, *packages: str) -> None:
    """Raise PTQError if a package is not installed that an extra brings, before any work.

    packages: by their import names.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        do = f"pip install 'ptq4vit-fx[{extra}]'"
        raise failure(operation, subject, expected=f"the package {missing[0]}", got="none", do=do)


#: Characters of a value that a sentence quotes.
QUOTED = 60


def quoted(value: object) -> str:
    """Return a value as a sentence quotes it: one line, not long, no control characters."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


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
