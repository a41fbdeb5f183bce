"""Functions that belong to one instance (a replaced forward, a hook) follow that instance into its copy.

`copy.deepcopy` takes a function for a constant: `m.forward = lambda x: m.forward_features(x)` would call the original
model from its copy, and a hook that collects outputs in a list would collect those of the copy in the user's list.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

#: What a function of an instance may keep values in: its copy keeps them in a copy.
CONTAINERS = (list, dict, set, Tensor)

#: Of a deepcopy: the address of an original -> its copy.
Memo = dict[int, Any]


def rebind(duplicate: nn.Module, memo: Memo) -> None:
    """Make every function that the modules of a deep copy hold read the copies of what it read."""
    for module in duplicate.modules():
        for name, value in list(vars(module).items()):
            module.__dict__[name] = _rebound(value, memo)


def _rebound(value: Any, memo: Memo) -> Any:
    """Return a function, or a partial, method, dict or list of such, over copies; itself if it reads none."""
    if not _reads_copied(value, memo, set()):
        return value
    if isinstance(value, types.FunctionType):
        return memo[id(value)] if id(value) in memo else _function(value, memo)
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, memo), memo.get(id(value.__self__), value.__self__))
    if isinstance(value, functools.partial):
        keywords = {key: _copied(entry, memo) for key, entry in value.keywords.items()}
        return functools.partial(_copied(value.func, memo), *(_copied(a, memo) for a in value.args), **keywords)
    for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
        value[key] = _rebound(entry, memo)
    return value


def _function(function: types.FunctionType, memo: Memo) -> types.FunctionType:
    names = dict(function.__globals__)
    cells = function.__closure__ or ()
    new = types.FunctionType(function.__code__, names, function.__name__, None, tuple(types.CellType() for _ in cells))
    memo[id(function)] = new  # before its cells, one of which may hold the function itself
    memo.setdefault(id(memo), []).append(function)  # alive: its address must not become another object's
    names |= {name: memo[id(value)] for name, value in _globals_read(function) if id(value) in memo}
    for mine, theirs in zip(new.__closure__ or (), cells, strict=True):
        for content in _contents(theirs):
            mine.cell_contents = _copied(content, memo)
    new.__defaults__ = function.__defaults__ and tuple(_copied(value, memo) for value in function.__defaults__)
    defaults = function.__kwdefaults__
    new.__kwdefaults__ = defaults and {key: _copied(value, memo) for key, value in defaults.items()}
    new.__dict__.update(vars(function))
    new.__module__, new.__qualname__ = function.__module__, function.__qualname__
    return new


def _copied(value: Any, memo: Memo) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    return copy.deepcopy(value, memo) if isinstance(value, CONTAINERS) else _rebound(value, memo)


def _reads_copied(value: Any, memo: Memo, seen: set[int]) -> bool:
    """Return whether a callable reads what was copied, or keeps values; of a dict or list: one of its entries."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        read = [entry for _, entry in _globals_read(value) if not isinstance(entry, CONTAINERS)]
        held = [content for cell in value.__closure__ or () for content in _contents(cell)]
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, types.MethodType):
        read, held = [value.__self__], [value.__func__]
    elif isinstance(value, functools.partial):
        read, held = [], [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, dict | list):
        entries = value.values() if isinstance(value, dict) else value
        return any(
            callable(entry) and not isinstance(entry, nn.Module) and _reads_copied(entry, memo, seen)
            for entry in entries
        )
    else:
        return False
    return any(id(entry) in memo for entry in [*read, *held]) or any(
        isinstance(entry, CONTAINERS) or _reads_copied(entry, memo, seen) for entry in held
    )


def _globals_read(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    names = function.__globals__
    return ((name, names[name]) for name in function.__code__.co_names if name in names)


def _contents(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # of a name that is not assigned yet
        return []
