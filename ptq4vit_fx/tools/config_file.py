"""`--config`: the options of a command in a TOML file, as click's `default_map` takes them, and written as such."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from ptq4vit_fx.errors import failure, foreign, near_names, quoted
from ptq4vit_fx.files import check_readable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Options that a file cannot hold, and those that say nothing of what a run does.
NOT_IN_A_FILE, NOT_OF_A_RUN = ("config", "print-config"), ("plan",)
#: Names of models that are paths: of timm's own source, of a folder, of a Python file with what it defines.
LOCAL_SOURCE, LOCAL_MODEL = "local-dir:", re.compile(r"local-dir:|[.~/]|.*\.py:")
#: How TOML calls a value of each type.
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a string"}


@dataclass(frozen=True)
class Option:
    """An option, or the argument, of a command: its parameter, and its long names without dashes in front.

    off: the name of the switch that turns it off. kind: bool, int, float, str or Path. many: whether it is repeatable.
    path: whether it names a file or a folder; model: whether it is the argument, which may. low, high: bounds of a
    number; number: whether a text may be a number as well.
    """

    parameter: str
    names: tuple[str, ...]
    off: str | None
    kind: type
    many: bool
    path: bool
    model: bool
    low: float | None
    high: float | None
    number: bool = False

    @property
    def name(self) -> str:
        """The name that is written."""
        return self.names[0]

    def beside(self, folder: str, value: Any) -> Any:
        """Return a value; of a path that is relative to a folder, the one that is relative to where one is."""
        if self.path:
            return value if value == "-" else os.path.join(folder, os.path.expanduser(str(value)))
        if not self.model or not LOCAL_MODEL.match(value):
            return value
        source = LOCAL_SOURCE if value.startswith(LOCAL_SOURCE) else ""
        return source + os.path.abspath(os.path.join(folder, os.path.expanduser(value.removeprefix(source))))

    def fits(self, value: object) -> bool:
        """Return whether a value out of a file is of this option's type."""
        accepted = {float: (int, float), Path: (str,)}.get(self.kind, (self.kind,))
        accepted = (str, int, float) if self.number else accepted
        return isinstance(value, accepted) and (self.kind is bool or not isinstance(value, bool))


def options_of(command: Callable[..., Any]) -> list[Option]:
    """Return what the function of a typer command declares, in its order."""
    hints, found = get_type_hints(command, include_extras=True), []
    for parameter in inspect.signature(command).parameters:
        kind, *notes = get_args(hints[parameter]) or (hints[parameter],)
        info = next((note for note in notes if isinstance(note, ArgumentInfo | OptionInfo)), None)
        if info is None:  # typer's own context
            continue
        kind = next((part for part in get_args(kind) if part is not type(None)), kind) if _optional(kind) else kind
        many = get_origin(kind) is list
        kind = get_args(kind)[0] if many else kind
        # Of an Annotated option, the first name stands where its default would.
        own = [str(word) for word in (info.default, *(info.param_decls or ())) if str(word).startswith("--")]
        usual = parameter.replace("_", "-")
        names = own or [f"{usual}/no-{usual}" if kind is bool else usual]
        names = [name.replace("--", "") for word in names for name in word.split("/")]
        off = names.pop() if any("/" in word for word in own) or (kind is bool and not own) else None
        path, model = kind is Path or "PATH" in (info.metavar or ""), isinstance(info, ArgumentInfo)
        number = kind is str and "NUMBER" in (info.metavar or "")
        found.append(Option(parameter, tuple(names), off, kind, many, path, model, info.min, info.max, number))
    return found


def _optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def read_config(path: Path, command: Callable[..., Any]) -> dict[str, Any]:
    """Return parameter -> value of a TOML file that holds options by their long names, dashes or underscores.

    Paths are relative to the file. Raises PTQError, with the line, on a key that is no option (with near names), on one
    that is there twice, and on a value of another type.
    """
    subject = f"--config {path}"
    options = [option for option in options_of(command) if option.name not in NOT_IN_A_FILE]
    known = {name: option for option in options for name in option.names}
    switches = {option.off: option for option in options if option.off}
    do = 'write lines such as: recipe = "best"'
    file = check_readable(path, "quantize --config", "a TOML file")
    with foreign("quantize", subject, expected="a TOML file", do=do):
        text = file.read_text(encoding="utf-8-sig")  # editors on Windows write a mark in front
        keys = tomllib.loads(text)
    values: dict[str, Any] = {}
    for key, value in keys.items():
        name, place = key.replace("_", "-"), f"{subject}, line {_line(text, key)}"
        option = known.get(name) or switches.get(name)
        if option is None:
            do = f"did you mean {near_names(name, known, 1)}?"
            raise failure("quantize", place, expected="an option of quantize", got=quoted(key), do=do)
        if option.parameter in values:
            raise failure("quantize", place, expected=f"{option.name} once", got="it twice", do="leave one of them out")
        checked = _checked(option, value, f"{place}: {key}", os.path.dirname(path))
        values[option.parameter] = not checked if name == option.off else checked
    return values


def _line(text: str, key: str) -> int:
    """Return the line that a key, or a table of that name, is written in."""
    found = re.search(rf"^[ \t]*\[*[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*[=.\]]", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def _checked(option: Option, value: Any, place: str, folder: str) -> Any:
    """Return a value as click is given it; raises PTQError unless it is what the option takes."""
    given = value if option.many and isinstance(value, list) else [value]
    if not all(map(option.fits, given)):
        expected = f"{WORDS[option.kind]}{', or a list of such' if option.many else ''}"
        raise failure("quantize", place, expected=expected, got=quoted(value), do="change that value")
    low, high = option.low, option.high
    if option.kind in (int, float) and not (low is None or value >= low) * (high is None or value <= high):
        expected = f"{low} or more" if high is None else f"{low} to {high}"
        raise failure("quantize", place, expected=expected, got=quoted(value), do="change that value")
    given = [option.beside(folder, one) for one in given]
    return given if option.many else given[0]


def as_toml(command: Callable[..., Any], values: Mapping[str, Any]) -> str:
    """Return the text of a file that repeats a run with these values, parameter -> value; paths are absolute."""
    lines = ["# ptq4vit quantize --config FILE; what stands on the command line wins"]
    for option in options_of(command):
        value = values.get(option.parameter)
        if option.name in (*NOT_IN_A_FILE, *NOT_OF_A_RUN) or value is None or value in ([], ()):
            continue
        given = [option.beside(os.getcwd(), one) for one in (value if option.many else [value])]
        texts = [_literal(one) for one in given]
        lines.append(f"{option.name} = {'[' + ', '.join(texts) + ']' if option.many else texts[0]}")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    """Return a string, number or boolean as TOML spells it. Raises PTQError on what is no text, which TOML has not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if not isinstance(value, str):
            return str(value).lower()
        try:
            value.encode()
        except UnicodeEncodeError as error:
            do = "rename it"
            raise failure("quantize", "--print-config", expected="names in UTF-8", got=quoted(value), do=do) from error
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value) if math.isfinite(value) else str(value)
