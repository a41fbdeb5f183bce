"""Forwards that take a list or a mapping of tensors as one parameter: the wrapper that gives each tensor its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ptq4vit_fx.errors import failure, quoted
from ptq4vit_fx.inputs.tensors import by_name

#: Arguments of one call: by position, by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def check_containers(model: nn.Module, given: Any, operation: str, subject: str = "example_inputs") -> None:
    """Raise PTQError if the model runs on what was given with a list or a mapping as an argument.

    given: what cannot be taken as tensors, one for each parameter.
    """
    if isinstance(given, (Tensor, np.ndarray)):
        return
    try:
        signature = inspect.signature(model.forward)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        trial = copy.deepcopy(model).eval().float()
    except Exception:  # noqa: BLE001 - whatever it is, the caller has the sentence
        return
    for args, kwargs in _calls(given):
        try:
            arguments = signature.bind(*args, **kwargs).arguments
            with torch.no_grad():
                trial(*_as_floats(args, device), **_as_floats(kwargs, device))
        except Exception:  # noqa: BLE001 - it is not called like this
            continue
        holders = [name for name, value in _entries(signature, arguments) if _holds_tensors(value)]
        if not holders:  # what it does not get through is something else
            return
        held, written = dict(_entries(signature, arguments))[holders[0]], _Writing()
        call = ", ".join(_written(signature, name, value, written) for name, value in arguments.items())
        names = ", ".join(written.names)
        example = f"({names}{',' * (len(written.names) == 1)})"
        raise failure(
            operation,
            subject,
            expected=f"a tensor for each parameter of {type(model).__name__}.forward",
            got=f"{type(held).__name__} for {holders[0]!r}",
            do="wrap the model in a module whose forward has a parameter for each tensor in it, "
            "`def __init__(self, model): super().__init__(); self.model = model` and "
            f"`def forward(self, {names}): return self.model({call})`, and pass {example}",
        )


def _calls(given: Any) -> Iterator[Call]:
    """Yield the ways in which a forward may be called with this."""
    named = by_name(given)
    if named is not None and all(isinstance(name, str) for name in named):
        yield (), dict(named)
    if isinstance(given, (tuple, list)):
        yield tuple(given), {}
        last = by_name(given[-1]) if given else None
        if last:
            yield tuple(given[:-1]), dict(last)
    yield (given,), {}
    if isinstance(given, (tuple, list)) and len(given) > 1:  # behind it the labels
        yield (given[0],), {}


def _entries(signature: inspect.Signature, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what each parameter gets, one by one what *args and **kwargs collect."""
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}[{number}]", x) for number, x in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _holds_tensors(value: Any) -> bool:
    """Return whether this is a list or mapping, of whatever depth, with a tensor in it."""
    mapping = by_name(value)
    parts = list(mapping.values()) if mapping is not None else value if isinstance(value, (tuple, list)) else ()
    return any(isinstance(part, (Tensor, np.ndarray)) or _holds_tensors(part) for part in parts)


def _as_floats(value: Any, device: torch.device) -> Any:
    def plain(x: Any) -> Any:
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        if not isinstance(x, Tensor):
            return x
        return x.detach().to(device, torch.float32 if x.is_floating_point() else x.dtype).clone()

    return tree_map(plain, value)


class _Writing:
    """The names of the tensors of a call, in their order, each once."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def name(self, wanted: str) -> str:
        """Return a name for one more tensor."""
        free = wanted if wanted.isidentifier() else "x"
        while free in self.names:
            free += "_"
        self.names.append(free)
        return free

    def value(self, value: Any, wanted: str) -> str:
        """Return the expression of a value, its tensors by name; wanted: the name of its place."""
        mapping: Mapping[str, Any] | None = by_name(value)
        if isinstance(value, (Tensor, np.ndarray)):
            return self.name(wanted)
        if mapping is not None:
            return f"{{{', '.join(f'{key!r}: {self.value(x, str(key))}' for key, x in mapping.items())}}}"
        if isinstance(value, (tuple, list)):
            inside = ", ".join(self.value(x, f"{wanted}_{number}") for number, x in enumerate(value))
            return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
        return quoted(value)


def _written(signature: inspect.Signature, name: str, value: Any, written: _Writing) -> str:
    """Return an argument as it is written in a call."""
    kind = signature.parameters[name].kind
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return ", ".join(written.value(x, f"{name}_{number}") for number, x in enumerate(value))
    if kind is inspect.Parameter.VAR_KEYWORD:
        return ", ".join(f"{key}={written.value(x, key)}" for key, x in value.items())
    text = written.value(value, name)
    return f"{name}={text}" if kind is inspect.Parameter.KEYWORD_ONLY else text
