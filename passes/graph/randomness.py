"""Random numbers that a forward draws: whose they are, where torch draws them, and how to give them back."""

from __future__ import annotations

import contextlib
import pickle
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4vit_fx.passes.graph.places import frames_here, place_of
from ptq4vit_fx.passes.graph.symbolic_sizes import namespaces

#: Operators that torch tags as random, whether they drop anything or not.
FUSED = "_scaled_dot_product"


@contextlib.contextmanager
def random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Give back the state of all random generators behind what a model draws, torch's on its devices too."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def generator_states(model: nn.Module) -> dict[str, bytes]:
    """Return the states of the generators that a forward may draw from: Python's, NumPy's, torch's, those it holds."""
    states: dict[str, Any] = {
        "random": random.getstate(),
        "numpy.random": np.random.get_state(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    holders = [
        (f"module {path or '(root)'!r}, ", vars(holder))
        for path, module in model.named_modules()
        for holder in (module, *type(module).__mro__)
        if holder is not object
    ]
    for place, names in [*holders, *(("", names) for names in namespaces(model))]:
        for name, value in list(names.items()):
            state = _state_of(value)
            if state is not None:
                states[f"{place}{name}"] = state
    return {name: pickle.dumps(state) for name, state in states.items()}


def _state_of(value: Any) -> Any:
    """Return the state of a generator, None for anything else."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()
    return value.get_state().numpy().tobytes() if isinstance(value, torch.Generator) else None


def drawn(before: dict[str, bytes], after: dict[str, bytes]) -> str:
    """Return a generator that was drawn from meanwhile, "" if there is none.

    torch's is none of them: where its operators are random, their values tell.
    """
    changed = [name for name, state in after.items() if before.get(name) != state and name != "torch"]
    return changed[0] if changed else ""


def is_alone() -> bool:
    """Return whether nobody else can have drawn: beside other threads of Python, nothing is sure."""
    return threading.active_count() == 1


class RandomCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that draws random numbers: its name, and where it is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.found = model, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        drops = not name.startswith(FUSED) or any(isinstance(x, float) and x > 0 for x in args)
        if torch.Tag.nondeterministic_seeded in func.tags and drops:
            place = place_of(frames_here(), self.model)
            self.found.append(f"{name} is random in {place}")
        return func(*args, **(kwargs or {}))
