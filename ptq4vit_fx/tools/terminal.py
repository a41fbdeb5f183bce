"""What a command prints and how it ends: results on standard output, warnings and errors on standard error."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from ptq4vit_fx.errors import PTQError, PTQWarning, printable

if TYPE_CHECKING:
    from ptq4vit_fx.tools.phases import Phases

#: How a command ends; 2 is that of a command line that cannot be read.
DONE, FAILED, MISUSED, POOR, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = (
    f"Exit codes: {DONE} done; {FAILED} an error, one sentence on standard error; {MISUSED} options that do not exist; "
    f"{POOR} the file is written, and worse than --fail-under; {INTERRUPTED} interrupted."
)

console = Console(soft_wrap=True, markup=False, emoji=False)
#: Standard error: warnings, errors, and what is under way.
complaints = Console(soft_wrap=True, markup=False, emoji=False, stderr=True)


def say(text: object, *, highlight: bool = True, to: Console = console) -> None:
    """Print lines in which names out of files stand: a terminal obeys nothing of them, and any encoding takes them."""
    shown = printable(str(text), keep="\n").encode(to.encoding, "backslashreplace").decode(to.encoding)
    to.print(shown, highlight=highlight)


def typed(context: typer.Context) -> str:
    """Return the command under way as one may type it again: its name, its arguments, the options that were given."""
    words = ["ptq4vit", context.info_name or ""]
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if parameter.param_type_name == "argument":
                words.append(str(one))
            elif isinstance(one, bool):
                words.append(parameter.opts[0] if one else parameter.secondary_opts[0])
            else:
                words += [parameter.opts[0], str(one)]
    return shlex.join(words)


def say_json(figures: Mapping[str, Any]) -> None:
    """Print figures as JSON; NaN and infinity, which JSON has not, become null."""
    say(json.dumps(_finite(figures), indent=2, default=str, allow_nan=False), highlight=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def showing(shown: bool = True) -> Phases:
    """Return what shows on standard error which phase is under way; the first one is importing, and ends here."""
    from ptq4vit_fx.tools.phases import IMPORT, IMPORTING, Phases

    phases = Phases(complaints, shown=shown)
    with phases(IMPORT, IMPORTING):
        import onnxruntime  # noqa: F401
        import timm  # noqa: F401
    return phases


def forms_beside(checkpoint: Path) -> Path:
    """Return the folder that keeps the forms of products, which tuning searches, where there is a checkpoint."""
    return checkpoint.with_name(f"{checkpoint.name}.forms")


@contextmanager
def readable_errors(checkpoint: Path | None = None) -> Iterator[list[str]]:
    """Print warnings of this package as lines and its errors as one sentence; leave with exit code 1, or 130.

    Gives the list of the warnings, which grows; each is printed once.
    """
    heard: list[str] = []

    def hear(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in heard:
            heard.append(str(message))
            say(f"warning: {message}", to=complaints)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=PTQWarning)
        warnings.showwarning = hear
        try:
            yield heard
        except PTQError as error:
            say(f"error: {error}", to=complaints)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as interrupt:
            places = [] if checkpoint is None else [checkpoint, forms_beside(checkpoint)]
            kept = next((place for place in places if place.exists()), None)
            say(
                f"interrupted: finished products are in {kept}, the same command goes on from there"
                if kept is not None
                else "interrupted: nothing was written",
                to=complaints,
            )
            raise typer.Exit(INTERRUPTED) from interrupt
