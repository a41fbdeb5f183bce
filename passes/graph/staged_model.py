"""The prepared or converted model in what a user passes as one, and who is at work on it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, cast

from torch.fx import GraphModule

from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.graph.contract import stage_of
from ptq4vit_fx.passes.graph.float_model import unwrapped
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.graph.traced_module import TracedModule

#: The calls that give a model of a stage.
MADE_BY = {Stage.OBSERVED: "prepare_fx", Stage.CONVERTED: "convert_fx or quantize"}

_CALIBRATED_NOW: weakref.WeakSet[GraphModule] = weakref.WeakSet()
_LOCK = threading.Lock()


def model_at(stage: Stage, model: Any, operation: str, do: str) -> TracedModule:
    """Return the model of that stage in what was passed.

    Raises PTQError on any other, and on a prepared model that another call of `calibrate` works on.
    """
    model = unwrapped(model)
    found = stage_of(model) if isinstance(model, GraphModule) else None
    if found is not stage:
        expected, name = f"a model at stage {stage.value!r}, from {MADE_BY[stage]}", type(model).__name__
        got = f"stage {found.value!r}" if found else "a model that this package did not make"
        raise failure(operation, name, expected=expected, got=got, do=do)
    with _LOCK:
        _check_free(model, operation)
    return cast("TracedModule", model)


@contextlib.contextmanager
def calibrated_alone(prepared: GraphModule) -> Iterator[None]:
    """Have a prepared model to oneself: its observers record for one calibration. Raises PTQError if it is taken."""
    with _LOCK:
        _check_free(prepared, "calibrate")
        _CALIBRATED_NOW.add(prepared)
    try:
        yield
    finally:
        with _LOCK:
            _CALIBRATED_NOW.discard(prepared)


def _check_free(model: GraphModule, operation: str) -> None:
    if model in _CALIBRATED_NOW:
        do = "wait for it, or give each its own model: copy.deepcopy(prepared) before the first calibration"
        expected, got = "a prepared model that nobody else is at work on", "one that another call of calibrate works on"
        raise failure(operation, type(model).__name__, expected=expected, got=got, do=do)
