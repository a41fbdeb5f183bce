"""Small graphs for the tests of single passes."""

from __future__ import annotations

import torch
from torch import nn

from ptq4vit_fx.passes.graph.contract import history


class Call(nn.Module):
    """A function of the input, and modules that it may use."""

    def __init__(self, function, **modules) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def model_of(function, **modules):
    torch.manual_seed(0)
    return Call(function, **modules).eval()


def count(graph_module):
    """Return how many places the last pass rewrote."""
    return history(graph_module)[-1].count
