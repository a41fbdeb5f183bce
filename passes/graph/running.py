"""Run a graph on what a user gives: where it cannot, the sentence says in which line of his model, and why."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import GraphModule

from ptq4vit_fx.errors import PTQError, failure
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.causes import said
from ptq4vit_fx.passes.graph.places import place_in

#: What torch says of calls that gradients forbid.
IN_PLACE = re.compile(r"modified inplace|in-place|inplace|derivative|requires? grad")


def run(graph_module: GraphModule, inputs: Inputs, operation: str) -> Any:
    """Return the output of a graph. Raises PTQError where it cannot run: on its example, without gradients, it has."""
    try:
        return graph_module(*inputs)
    except (PTQError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the user's model raises
        expected, do = "a forward that runs on these images", "run the float model on them and mend what it raises"
        if IN_PLACE.search(str(error)):
            expected = "a forward that runs with gradients"
            do = "write that call without changing a tensor in place, or keep its module closed with leaf_modules="
        place = place_in(graph_module, error)
        raise failure(operation, place, expected=expected, got=said(error), do=do) from error
