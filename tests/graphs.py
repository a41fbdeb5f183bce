"""Small graphs for the tests of single passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vit_fx.passes.graph.contract import history


class Call(nn.Module):
    """A function of the input, and modules that it may use."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def model_of(function: Callable[[Any, Tensor], Any], **modules: nn.Module) -> Call:
    torch.manual_seed(0)
    return Call(function, **modules).eval()


def count(graph_module: GraphModule) -> int:
    """Return how many places the last pass rewrote."""
    return history(graph_module)[-1].count
