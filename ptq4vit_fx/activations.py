"""What is known of the values that come out of an activation function: the reason to choose another quantizer.

A function with a short negative range and an unbounded positive one gets the paper's twin quantizer after GELU; one
that is never negative gets all codes of a uniform quantizer for the positive side.
"""

from __future__ import annotations

from typing import Literal

SourceActivation = Literal["softmax", "gelu", "gelu_tanh", "silu", "quick_gelu", "hardswish", "relu", "sigmoid"]

#: QuickGELU's factor inside the sigmoid.
QUICK_GELU_FACTOR = 1.702

#: How far below zero the function goes. For silu = x * sigmoid(x) the slope is zero where 1 + x * (1 - sigmoid(x)) = 0,
#: at x = -1.2785; quick_gelu = x * sigmoid(1.702 x) is silu in other units; hardswish = x * relu6(x + 3) / 6 is lowest
#: at x = -1.5; gelu is lowest at x = -0.7518, its tanh approximation at x = -0.7525.
NEGATIVE_RANGE: dict[SourceActivation, float] = {
    "softmax": 0.0,
    "gelu": 0.16997120747990369,
    "gelu_tanh": 0.17004075057125412,
    "silu": 0.27846454276107380,
    "quick_gelu": 0.27846454276107380 / QUICK_GELU_FACTOR,
    "hardswish": 0.375,
    "relu": 0.0,
    "sigmoid": 0.0,
}
