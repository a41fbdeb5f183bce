"""Recognize the activation function that a node computes. The tables derive from `ptq4vit_fx/activations.py`."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from ptq4vit_fx.activations import ACTIVATIONS, QUICK_GELU_FACTOR, Activation, SourceActivation

#: Type of a module -> its activation; type of torch.nn alone, a subclass may compute anything.
BY_MODULE: dict[type[nn.Module], Activation] = {a.module: a for a in ACTIVATIONS if a.module is not None}
#: Another spelling, a function or the name of a method -> the canonical function.
SPELLINGS: dict[Any, Any] = {
    spelling: a.function
    for a in ACTIVATIONS
    if a.function is not None and a.elementwise
    for name in (a.function.__name__,)
    for spelling in (getattr(torch, name, None), getattr(F, name, None), name if hasattr(torch.Tensor, name) else None)
    if spelling not in (None, a.function)
}
#: Operator of torch.export -> the canonical function; those that overwrite their argument apart.
BY_ATEN: dict[Any, Any] = {a.aten: a.function for a in ACTIVATIONS if a.aten is not None}
IN_PLACE: dict[Any, Any] = {a.in_place: a.function for a in ACTIVATIONS if a.in_place is not None}
FUNCTIONS = frozenset(a.function for a in ACTIVATIONS if a.function is not None)
#: Names of canonical functions that compute every element from one alone.
ELEMENTWISE = frozenset(a.function.__name__ for a in ACTIVATIONS if a.function is not None and a.elementwise)

MULTIPLICATIONS = (torch.mul, operator.mul, "mul", torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)


def activation_of(node: Node) -> SourceActivation | None:
    """Return the activation that this node of a canonical graph computes, None if it is none of the known ones."""
    if node.target in MULTIPLICATIONS:
        return _gated_by_itself(node)
    if node.op != "call_function" or node.target not in FUNCTIONS:
        return None
    # The first with its function and keywords: what a call leaves out has the default, which the first one has.
    known = [a for a in ACTIVATIONS if a.function is node.target]
    return next((a.name for a in known if all(node.kwargs.get(k, v) == v for k, v in a.keywords.items())), None)


def _gated_by_itself(node: Node) -> SourceActivation | None:
    """Return silu for x * sigmoid(x), quick_gelu for x * sigmoid(1.702 x); another gate has no bounded range."""
    for value, gate in (node.args, node.args[::-1]):
        if not isinstance(gate, Node) or gate.target is not torch.sigmoid:
            continue
        inner = gate.args[0]
        if inner is value:
            return "silu"
        if isinstance(inner, Node) and inner.target in MULTIPLICATIONS and value in inner.args:
            factor = next(a for a in inner.args if a is not value) if inner.args[0] is not inner.args[1] else None
            return "quick_gelu" if factor == QUICK_GELU_FACTOR else None
    return None
