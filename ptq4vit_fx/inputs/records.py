"""JSON that may come from anybody, read into dataclasses: what their types say is held, or refused in one sentence."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ptq4vit_fx.errors import QUOTED, PTQError, failure, quoted

#: Brackets within brackets. What this package writes has five; json recurses, and so does what reads its values.
DEEPEST = 64
#: Characters of an integer: those of 64 bits have 20 with their sign. Python refuses to print some thousands.
LONGEST_INTEGER = 20

DAMAGED = "the file is damaged, or something else wrote it: write it again with this package"


@dataclass(frozen=True)
class Place:
    """Where a value stands, for the sentence that refuses it: what reads it, of which file, and the way to it inside.

    do: the advice of that sentence.
    """

    operation: str
    subject: str
    path: str = ""
    do: str = DAMAGED

    def at(self, key: str | int) -> Place:
        """Return the place of an entry of the value at this place."""
        step = f"[{key}]" if isinstance(key, int) else f".{_spelled(key)}"
        return dataclasses.replace(self, path=f"{self.path}{step}".removeprefix("."))

    def refusal(self, expected: str, got: str) -> PTQError:
        """Return the error that says what should stand here."""
        return failure(self.operation, self.subject_and_path, expected=expected, got=got, do=self.do)

    def with_reason(self, error: PTQError) -> PTQError:
        """Return the error of what else refused the value at this place, with this place's advice."""
        said = str(error).rpartition("; ")[0]
        return PTQError(f"{self.operation}: {self.subject_and_path}: {said}; {self.do}")

    @property
    def subject_and_path(self) -> str:
        """The file, and where in it."""
        return f"{self.subject}: {self.path}" if self.path else self.subject


def read_json(text: Any, place: Place) -> Any:
    """Return the value of JSON text; raises PTQError, and nothing else, on any other text.

    Refused too: a key that repeats, text that UTF-8 cannot hold, integers above 64 bits, more than DEEPEST brackets
    within each other. NaN and Infinity, which Python writes, are read.
    """
    if not isinstance(text, str):
        raise place.refusal("JSON", f"a value of type {type(text).__name__}")
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition, parse_int=_integer)
        text.encode()
        _check_depth(value, DEEPEST)
    except (ValueError, RecursionError) as error:
        reason = "brackets nested too deep" if isinstance(error, RecursionError) else str(error)
        raise place.refusal("JSON", f"{quoted(text)} ({reason})") from error
    return value


def read_as(kind: Any, value: Any, place: Place) -> Any:
    """Return a value that `json` gave as one of a type: what it was before `asdict` and `json.dumps`.

    kind: a dataclass, whose fields are read by their types and which may check them itself; str, int, float, bool,
    None, Any, Literal, a tuple, a dict with str as keys, or a union of such, in which a dataclass is told by its name,
    the entry `kind`. Raises PTQError that names the place on anything else.
    """
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, place)
    for origins, read in _READERS:
        if get_origin(kind) in origins:
            return read(get_args(kind), value, place)
    if kind is float:
        return _read_float(value, place)
    if kind is not Any and type(value) is not kind:
        raise place.refusal(_called(kind), quoted(value))
    if kind is str and not _is_text(value):
        raise place.refusal("text", quoted(value))
    return value


def _read_dataclass(kind: Any, value: Any, place: Place) -> Any:
    """Return an instance; fields that have defaults may be absent."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if not isinstance(value, dict):
        raise place.refusal(f"an object with {', '.join(fields)}", quoted(value))
    unknown = [key for key in value if key not in fields]
    if unknown:
        raise place.at(kind.__name__).refusal("fields that this version knows", _spelled(unknown[0]))
    missing = [name for name, field in fields.items() if name not in value and _is_required(field)]
    if missing:
        raise place.at(kind.__name__).refusal(f"a field {missing[0]}", "none")
    types_of = _types_of(kind)
    arguments = {key: read_as(types_of[key], entry, place.at(key)) for key, entry in value.items()}
    try:
        return kind(**arguments)
    except PTQError as error:
        raise place.with_reason(error) from error


def _read_union(kinds: tuple[Any, ...], value: Any, place: Place) -> Any:
    named: dict[str, Any] = {getattr(kind, "__name__", ""): kind for kind in kinds if dataclasses.is_dataclass(kind)}
    if named:
        name = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in named:
            raise place.at("kind").refusal(" or ".join(named), quoted(name))
        return read_as(named[name], {key: entry for key, entry in value.items() if key != "kind"}, place)
    for kind in kinds:
        try:
            return read_as(kind, value, place)
        except PTQError:
            continue
    raise place.refusal(" or ".join(_called(kind) for kind in kinds), quoted(value))


def _read_tuple(kinds: tuple[Any, ...], value: Any, place: Place) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise place.refusal("a list", quoted(value))
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise place.refusal(f"a list of {len(kinds)}", quoted(value))
    return tuple(read_as(kind, entry, place.at(i)) for i, (kind, entry) in enumerate(zip(kinds, value, strict=True)))


def _read_dict(kinds: tuple[Any, ...], value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise place.refusal("an object", quoted(value))
    return {read_as(str, key, place): read_as(kinds[1], entry, place.at(key)) for key, entry in value.items()}


def _read_literal(choices: tuple[Any, ...], value: Any, place: Place) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise place.refusal(_called(Literal[choices]), quoted(value))
    return value


def _read_float(value: Any, place: Place) -> float:
    if type(value) not in (int, float):
        raise place.refusal("a number", quoted(value))
    return float(value)


_READERS: tuple[tuple[tuple[Any, ...], Callable[[tuple[Any, ...], Any, Place], Any]], ...] = (
    ((Union, types.UnionType), _read_union),
    ((tuple,), _read_tuple),
    ((dict,), _read_dict),
    ((Literal,), _read_literal),
)


@functools.cache
def _types_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _called(kind: Any) -> str:
    names = {str: "text", int: "an integer", bool: "true or false", type(None): "null", float: "a number"}
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return names.get(kind) or {tuple: "a list", dict: "an object"}.get(get_origin(kind), str(kind))


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that repeats")
    return found


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER or abs(int(text)) >= 2**63:
        raise ValueError("an integer of more than 64 bits")
    return int(text)


def _spelled(key: str) -> str:
    return key if key.isprintable() and 0 < len(key) <= QUOTED else quoted(key)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def _check_depth(value: Any, left: int) -> None:
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if entries and left == 0:
        raise RecursionError
    for entry in entries:
        _check_depth(entry, left - 1)
