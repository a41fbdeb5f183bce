"""How a model is called: what its inputs are named, which are given by keyword, and which form its output gets."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph

from ptq4vit_fx.errors import failure
from ptq4vit_fx.inputs.items import PARAMETER
from ptq4vit_fx.passes.graph.outputs import plain_outputs

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class ModelCall:
    """A call of a model on tensors: names of the inputs; those behind the first `positional` are given by keyword.

    keys: whether a mapping of `logits` alone stays one, see `plain_outputs`.
    """

    names: tuple[str, ...]
    positional: int
    keys: bool = False

    def __call__(self, model: nn.Module, *tensors: Tensor) -> Any:
        """Return `plain_outputs` of what the model itself gives, with its hooks and its replaced forward."""
        by_name = dict(zip(self.names[self.positional :], tensors[self.positional :], strict=True))
        return plain_outputs(model(*tensors[: self.positional], **by_name), keys=self.keys)


def name_inputs(graph: Graph, names: Sequence[str]) -> None:
    """Note which parameter each placeholder is, and call it in the graph's code as its node, in place.

    That code says `self`, `torch` and `getattr` itself; torch.fx keeps nodes from such names, parameters it does not.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.meta[PARAMETER] = name
        if node.name == "self":
            node._rename("self_1")
        node.target = node.name


def call_of(model: nn.Module, count: int, names: Sequence[str] | None = None, *, complete: bool = True) -> ModelCall:
    """Return the call of `model` on `count` inputs: its first parameters, or the ones that are named.

    Raises PTQError if forward has no such parameter, or, if the call has to be complete, one without a default that is
    not given.
    """
    parameters = _parameters(model)
    free = [p for p in parameters if p.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    positional = [p.name for p in parameters if p.kind in POSITIONAL]
    named = [p.name for p in parameters if p not in free]
    if names is not None:
        call = ModelCall(tuple(names), 0)
        fits = set(names) <= set(named) or any(p.kind is Parameter.VAR_KEYWORD for p in free)
    elif count > len(positional) and any(p.kind is Parameter.VAR_POSITIONAL for p in free):
        call, fits = ModelCall(tuple(f"input_{i}" for i in range(count)), count), True
    else:
        by_keyword = [name for name in named if name not in positional]
        names = (positional + by_keyword)[:count]
        call, fits = ModelCall(tuple(names), min(count, len(positional))), len(names) == count
    given = positional[:count] if call.names and call.names[0].startswith("input_") else call.names
    missing = [p.name for p in parameters if p not in free and p.default is Parameter.empty and p.name not in given]
    if not fits or (missing and complete):
        signature = ", ".join(str(p.replace(annotation=Parameter.empty)) for p in parameters)
        raise failure(
            "prepare_fx",
            f"{type(model).__name__}.forward({signature})",
            expected=f"inputs for {', '.join(named) or 'its parameters'}",
            got=", ".join(call.names) if names is not None and not fits else f"{count} inputs",
            do=f"give {', '.join(missing)} too: example_inputs=({', '.join([*given, *missing])})"
            if missing
            else "pass one tensor per parameter, in their order, or a mapping from their names",
        )
    return call


def _parameters(model: nn.Module) -> list[Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # of a builtin: it takes what it is given
        return [Parameter("inputs", Parameter.VAR_POSITIONAL)]
