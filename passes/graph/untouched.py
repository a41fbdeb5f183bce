"""What a tracer leaves in caches of classes, functions and files of the user's is taken out again.

A cache that a forward fills while it is traced holds symbols. In the copy of the model they do not matter, but what is
shared with it (attributes of classes and functions, globals, functools.cache) would break the next forward of the user.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Proxy

from ptq4vit_fx.passes.graph.symbolic_sizes import namespaces

#: What stands for a value while it is traced.
SYMBOLS = (Proxy, FakeTensor, FunctionalTensor, torch.SymInt, torch.SymFloat, torch.SymBool)

#: A dict of attributes or globals, and how to give one of its names a value.
Holder = tuple[Any, Callable[[str, Any], None]]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Take out of everything that the model shares with its user what tracers put there."""
    holders = list(_holders(model))
    before = [{name: _contents(value) for name, value in holder.items()} for holder, _ in holders]
    values = [value for holder, _ in holders for value in list(holder.values())]
    caches = {id(value): value for value in values if isinstance(value, functools._lru_cache_wrapper)}
    sizes = {key: cache.cache_info().currsize for key, cache in caches.items()}
    try:
        yield
    finally:
        for (holder, give), contents in zip(holders, before, strict=True):
            for name, value in list(holder.items()):
                if _is_symbolic(value):
                    old = contents.get(name)
                    give(name, _filled(value, old) if isinstance(value, dict | list) else old)
        for key, cache in caches.items():
            if cache.cache_info().currsize != sizes[key]:
                cache.cache_clear()


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list) else value


def _filled(container: Any, contents: Any) -> Any:
    """Return the same dict or list with what it held before."""
    container.clear()
    if isinstance(container, dict):
        container.update(contents or {})
    else:
        container.extend(contents or [])
    return container


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(isinstance(entry, SYMBOLS) for entry in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, SYMBOLS)


def _holders(model: nn.Module) -> Iterator[Holder]:
    for kind in {kind for module in model.modules() for kind in type(module).__mro__ if kind is not object}:
        yield vars(kind), lambda name, value, kind=kind: setattr(kind, name, value)  # type: ignore[misc]
        for function in list(vars(kind).values()):
            if isinstance(function, types.FunctionType):
                yield vars(function), vars(function).__setitem__
    for names in namespaces(model):
        yield names, names.__setitem__
        for function in list(names.values()):
            if isinstance(function, types.FunctionType):
                yield vars(function), vars(function).__setitem__
