"""What a checkpoint holds that may be a model's weights: its entries, the prefixes of their keys, averaged or not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Wrappers that write their own name into the middle of a key.
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")

#: Entries that hold averaged weights, which are those that were validated; timm prefers them too.
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|teacher|averaged)(?![a-z])")
#: Where a name of words that are written together, `EMACallback`, is cut.
WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

#: Mappings in a checkpoint; one may hold itself, many times.
MOST_MAPPINGS = 1000

#: From weights by name to those by the names of a model; None if it cannot tell.
Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Entry:
    """Weights by name, out of an entry of a checkpoint; prefix: what was left out in front of their names."""

    name: str
    prefix: str
    state: dict[str, Tensor]

    @property
    def averaged(self) -> bool:
        return bool(AVERAGED.search(WORDS.sub("_", self.name).lower()))

    def shared(self, own: Mapping[str, Tensor]) -> int:
        """Return how many of a model's weights it has."""
        return len(self.state.keys() & own.keys())


def entries_of(checkpoint: Any, own: Mapping[str, Tensor]) -> list[Entry]:
    """Return every mapping of tensors by name, with the prefix left out that most of a model's names have in it.

    Where several prefixes have as many (`model.` and `ema_model.` side by side) each is an entry, named by both.
    """
    return [entry for name, state in _state_dicts(checkpoint) for entry in _without_prefix(name, state, own)]


def _state_dicts(value: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every mapping of tensors by name in a checkpoint, with the keys that lead to it.

    The first MOST_MAPPINGS are looked at. Only tensors that hold their values count: others cannot become weights.
    """
    waiting = [(value, "")]
    for _ in range(MOST_MAPPINGS):
        mapping, path = waiting.pop()
        named = {key: x for key, x in mapping.items() if isinstance(key, str)} if isinstance(mapping, Mapping) else {}
        tensors = {key: x for key, x in named.items() if _is_plain(x)}
        if tensors:
            yield path or "the file itself", tensors
        inner = [(x, f"{path}.{key}".removeprefix(".")) for key, x in named.items() if isinstance(x, Mapping)]
        waiting += reversed(inner)
        if not waiting:
            return


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and not (x.is_quantized or x.is_meta or x.is_nested)


def _without_prefix(name: str, state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[Entry]:
    """Return the state without the prefix that most keys have in front of one of the model's; of several, each.

    Keys without the prefix stay if the model has them (a head beside a backbone), else they are left out.
    """
    plain = {WRAPPERS.sub("", key): x for key, x in state.items()}
    counts: Counter[str] = Counter()
    for key in plain:
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        counts.update(key[:start] for start in starts if key[start:] in own)
    most = max(counts.values(), default=0)
    prefixes = sorted((prefix for prefix in counts if counts[prefix] == most), key=len)
    if not prefixes or not prefixes[0]:
        return [Entry(name, "", plain)]
    beside = {key: x for key, x in plain.items() if key in own}
    path = "" if name == "the file itself" else f"{name}."
    return [
        Entry(
            name if len(prefixes) == 1 else f"{path}{prefix[:-1]}",
            prefix,
            beside | {key.removeprefix(prefix): x for key, x in plain.items() if key.startswith(prefix)},
        )
        for prefix in prefixes
    ]


def fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Return whether a state has the names, shapes and kinds of a model's own one."""
    return state.keys() == own.keys() and all(
        state[key].shape == x.shape and state[key].is_floating_point() >= x.is_floating_point()
        for key, x in own.items()
    )


def converted(entry: Entry, own: Mapping[str, Tensor], convert: Convert) -> Entry | None:
    """Return an entry by the model's names as `convert` gives them, None if it does not.

    Names are tried as they are, and without the words that all of them start with.
    """
    prefix, state = entry.prefix, entry.state
    while state:
        found = convert(dict(state))
        if found is not None and fits(found, own):
            return Entry(entry.name, prefix, dict(found))
        first = {key.partition(".")[0] if "." in key else "" for key in state}
        if len(first) != 1 or "" in first:
            return None
        start = f"{first.pop()}."
        prefix, state = prefix + start, {key.removeprefix(start): x for key, x in state.items()}
    return None
