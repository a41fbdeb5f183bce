"""`len(x)` and `int(x.shape[0])` in a forward while torch.export traces it: both stay symbols, whatever the batch."""

from __future__ import annotations

import builtins
import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _len(x: Any) -> Any:
    return x.shape[0] if isinstance(x, Tensor) and x.ndim else builtins.len(x)


class _IntegerType(type):
    """Is `int` to whoever asks, but leaves a symbol as it is where `int` would fix its value."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        is_symbol = builtins.len(args) == 1 and not kwargs and isinstance(args[0], torch.SymInt)
        return args[0] if is_symbol else builtins.int(*args, **kwargs)

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, builtins.int)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, builtins.int)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is builtins.int

    def __hash__(cls) -> int:
        return hash(builtins.int)


_int = _IntegerType("int", (builtins.int,), {})


@contextlib.contextmanager
def symbolic_sizes(model: nn.Module) -> Iterator[None]:
    """Put these two in front of the builtins in every file that functions of the model are defined in."""
    changed = [
        (names, name)
        for names in namespaces(model)
        for name in ("len", "int")
        if getattr(builtins, name) is names.get(name, getattr(builtins, name))
    ]
    before = [(names, name, name in names) for names, name in changed]
    for names, name in changed:
        names[name] = _len if name == "len" else _int
    try:
        yield
    finally:
        for names, name, existed in before:
            if existed:
                names[name] = getattr(builtins, name)
            else:
                del names[name]


def namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Return the globals of every class and function that the modules are made of, and of the functions in these."""
    found: dict[int, dict[str, Any]] = {}

    def add(names: dict[str, Any]) -> bool:
        new = id(names) not in found and not str(names.get("__name__")).startswith(("torch.", "builtins"))
        if new and names.get("__name__") != "torch":
            found[id(names)] = names
        return new

    for module in model.modules():
        functions = [value for value in vars(module).values() if isinstance(value, types.FunctionType)]
        for kind in type(module).__mro__:
            functions += [value for value in vars(kind).values() if isinstance(value, types.FunctionType)]
            add(vars(sys.modules[kind.__module__]))
        for function in functions:
            add(function.__globals__)
    for names in list(found.values()):  # helpers that the forwards import
        for value in list(names.values()):
            if isinstance(value, types.FunctionType):
                add(value.__globals__)
    return list(found.values())
