"""What a model returns: containers of tensors that both tracers and torch.export know, and a name for each tensor.

| what a model returns | what the graph returns | names |
|---|---|---|
| a tensor; a mapping or dataclass of `logits` (batch, classes) alone | the tensor | logits |
| a mapping, a dataclass (the outputs of transformers are both) | a dict, without None | its keys |
| a tuple, a list, a named tuple | the same | output_0, output_1 ...; its fields |
| containers in containers | the same, each as above | hidden_states.0, aux.boxes |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.fx import Proxy

from ptq4vit_fx.errors import failure, warn

#: The name of what classes are read from, and of an output that has none of its own.
LOGITS = "logits"
#: What a graph can return beside tensors.
PLAIN = (bool, int, float, str, type(None))

Leaf = TypeVar("Leaf")
Path = tuple[str | int, ...]


def plain_outputs(output: Any, *, keys: bool = False) -> Any:
    """Return an output as the table above has it, its tensors and numbers untouched.

    keys: whether a mapping of `logits` alone stays one: what has another shape is told by its name only.

    Warns (PTQWarning) of objects inside of it that are no tensors, which are left out; raises PTQError if it is one.
    """
    plain = _plain(output, "")
    if plain is None:
        raise failure(
            "trace",
            "the model's output",
            expected="tensors, or mappings, dataclasses, tuples and lists of tensors",
            got=f"an object of {type(output).__name__}",
            do="wrap the model in a module that returns the tensors of that object",
        )
    return plain[LOGITS] if isinstance(plain, dict) and list(plain) == [LOGITS] and not keys else plain


def is_dense(output: Any) -> bool:
    """Return whether plain outputs with their keys are `logits` alone, but not (batch, classes)."""
    return isinstance(output, dict) and list(output) == [LOGITS] and getattr(output[LOGITS], "ndim", 2) != 2


def _plain(output: Any, path: str) -> Any:
    if isinstance(output, (Tensor, Proxy, *PLAIN)) or _is_symbolic(output):
        return output
    if isinstance(output, (tuple, list)):
        items = [_plain(item, f"{path}.{number}") for number, item in enumerate(output)]
        return type(output)(*items) if _fields(output) else items if isinstance(output, list) else tuple(items)
    if dataclasses.is_dataclass(output) and not isinstance(output, (Mapping, type)):
        output = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if not isinstance(output, Mapping):
        if path:
            text = f"output {path[1:]} is left out: {type(output).__name__} is no tensor and no container of tensors"
            warn(text)
        return None
    entries = {str(key): _plain(value, f"{path}.{key}") for key, value in output.items()}
    return {key: value for key, value in entries.items() if value is not None}


def _is_symbolic(output: Any) -> bool:
    """Return whether this is a size that torch.export has not fixed."""
    return type(output).__name__ in ("SymInt", "SymFloat", "SymBool")


def _fields(output: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of a named tuple's fields, () for another sequence."""
    return tuple(getattr(output, "_fields", ()))


def leaves(output: Any) -> Iterator[tuple[Path, Any]]:
    """Yield what an output holds that is no container, with the keys and positions that lead there."""
    if isinstance(output, Mapping):
        steps: list[tuple[str | int, Any]] = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        steps = list(zip(_fields(output) or range(len(output)), output, strict=True))
    else:
        yield (), output
        return
    for step, value in steps:
        yield from (((step, *path), leaf) for path, leaf in leaves(value))


def named(found: Sequence[tuple[Path, Leaf]], keep: Callable[[Leaf], bool]) -> dict[str, Leaf]:
    """Return name -> leaf of those to keep, in their order; every name is there once."""
    kept = [(number, path, leaf) for number, (path, leaf) in enumerate(found) if keep(leaf)]
    names: dict[str, Leaf] = {}
    for number, path, leaf in kept:
        base = name = _name(path, number, alone=len(kept) == 1)
        repeat = 0
        while name in names:
            repeat += 1
            name = f"{base}_{repeat}"
        names[name] = leaf
    return names


def _name(path: Path, number: int, *, alone: bool) -> str:
    """number: of the leaf, which is its name where no key leads to it."""
    if all(isinstance(step, int) for step in path):
        return LOGITS if alone else f"output_{number}"
    first, *rest = path
    return ".".join([first if isinstance(first, str) else f"output_{first}", *map(str, rest)])


def tensor_outputs(output: Any) -> dict[str, Tensor]:
    """Return name -> tensor of what a model returned."""
    return named(list(leaves(output)), lambda leaf: isinstance(leaf, Tensor))


def logits_in(outputs: Mapping[str, Any]) -> str | None:
    """Return the name of the tensor or array that classes are read from: `logits`, or the only (batch, classes)."""
    flat = [name for name, x in outputs.items() if x.ndim == 2]
    return LOGITS if LOGITS in outputs else flat[0] if len(flat) == 1 else None
