"""Recognize the activation function that a node computes."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ptq4vit_fx.activations import QUICK_GELU_FACTOR, SourceActivation

#: Canonical calls. F.gelu depends on an argument, products with a sigmoid on their operands.
CALLS: dict[Any, SourceActivation] = {
    F.softmax: "softmax",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.relu: "relu",
    F.relu6: "relu",
    torch.sigmoid: "sigmoid",
    F.hardsigmoid: "sigmoid",
}
MULTIPLICATIONS = (torch.mul, operator.mul, "mul")


def activation_of(node: Node) -> SourceActivation | None:
    """Return the activation that this node of a canonical graph computes, None if it is none of the known ones."""
    if node.target is F.gelu:
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if node.target in MULTIPLICATIONS:
        return _gated_by_itself(node)
    return CALLS.get(node.target) if node.op == "call_function" else None


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
