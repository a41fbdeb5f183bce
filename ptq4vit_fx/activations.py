"""One table of activation functions: how each is spelled, and what is known of the values that come out of it.

A function with a short negative range and an unbounded positive one gets the paper's twin quantizer after GELU; one
that is never negative gets all codes of a uniform quantizer for the positive side. Every other table of activations in
the project derives from this one: a new activation is a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: Name of an activation, as plans record where an operand comes from.
SourceActivation = str

aten = torch.ops.aten

#: QuickGELU's factor inside the sigmoid.
QUICK_GELU_FACTOR = 1.702
#: For silu = x * sigmoid(x) the slope is zero where 1 + x * (1 - sigmoid(x)) = 0, at x = -1.2785.
_SILU_MINIMUM = 0.27846454276107380


@dataclass(frozen=True)
class Activation:
    """One way to compute an activation function; several may share a name.

    name: what plans record. minimum: how far below zero the function goes. function: its canonical call, None if it is
    a pattern of several nodes. keywords: arguments of that call which tell it from another with the same function.
    module: the class of torch.nn that computes it, called with its attributes `settings` as keyword arguments.
    aten, in_place: operators of torch.export. elementwise: whether every element depends on one alone. Functions of
    torch and methods of tensors with the function's name compute the same, but for softmax, whose arguments differ.
    """

    name: SourceActivation
    minimum: float
    function: Callable[..., Any] | None = None
    module: type[nn.Module] | None = None
    aten: Any = None
    in_place: Any = None
    settings: tuple[str, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    elementwise: bool = True


#: gelu is lowest at x = -0.7518, its tanh approximation at x = -0.7525; quick_gelu = x * sigmoid(1.702 x) is silu in
#: other units; hardswish = x * relu6(x + 3) / 6 is lowest at x = -1.5; mish = x * tanh(log(1 + e^x)) at x = -1.1924.
ACTIVATIONS = (
    Activation("softmax", 0.0, F.softmax, nn.Softmax, settings=("dim",), elementwise=False),
    Activation(
        *("gelu", 0.16997120747990369, F.gelu, nn.GELU, aten.gelu.default),
        settings=("approximate",),
        keywords={"approximate": "none"},
    ),
    Activation("gelu_tanh", 0.17004075057125412, F.gelu, keywords={"approximate": "tanh"}),
    Activation("silu", _SILU_MINIMUM, F.silu, nn.SiLU, aten.silu.default, aten.silu_.default),
    Activation("quick_gelu", _SILU_MINIMUM / QUICK_GELU_FACTOR),
    Activation("hardswish", 0.375, F.hardswish, nn.Hardswish, aten.hardswish.default, aten.hardswish_.default),
    Activation("mish", 0.3088434130172504, F.mish, nn.Mish, aten.mish.default, aten.mish_.default),
    Activation("relu", 0.0, F.relu, nn.ReLU, aten.relu.default, aten.relu_.default),
    Activation("relu", 0.0, F.relu6, nn.ReLU6, aten.relu6.default, aten.relu6_.default),
    Activation("sigmoid", 0.0, torch.sigmoid, nn.Sigmoid, aten.sigmoid.default),
    Activation("sigmoid", 0.0, F.hardsigmoid, nn.Hardsigmoid, aten.hardsigmoid.default, aten.hardsigmoid_.default),
)

#: How far below zero each activation goes.
NEGATIVE_RANGE: dict[SourceActivation, float] = {activation.name: activation.minimum for activation in ACTIVATIONS}
