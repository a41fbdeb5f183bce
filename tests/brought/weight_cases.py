"""Weights that are no plain parameters of a layer: parts of one, computed in forward, shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brought import brought
from brought.attention_cases import DIM, HEADS, TOKENS, Tokens
from brought.pipeline import pictures, pipeline


class Weighted(Tokens):
    """Attention whose projections `project` computes from parameters and tokens; returns (batch, tokens, 3, 48)."""

    def __init__(self, project: Callable[[Any, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4 * DIM, DIM) * 0.2)
        self.b = nn.Parameter(torch.randn(4 * DIM) * 0.2) if bias else None
        self.scale = nn.Parameter(torch.rand(4 * DIM, 1) + 0.5)
        self.project = project

    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        qkv = self.project(self, x).reshape(-1, TOKENS, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, TOKENS, DIM)
        return y


def works(project: Callable[[Any, Tensor], Tensor], **arguments: Any) -> None:
    pipeline(Weighted(project, **arguments).eval(), pictures())


@brought("model", "q, k and v projections in chunks of one weight and one bias", quick=True)
def chunks() -> None:
    def project(m: Any, x: Tensor) -> Tensor:
        parts = zip(m.w.chunk(4), m.b.chunk(4), strict=True)
        return torch.stack([F.linear(x, w, b) for w, b in list(parts)[:3]], 2)

    works(project)


@brought("model", "a slice of a weight, without bias")
def a_slice() -> None:
    works(lambda m, x: F.linear(x, m.w[: 3 * DIM]), bias=False)


@brought("model", "a weight times a scale, a bias plus one")
def scaled() -> None:
    works(lambda m, x: F.linear(x, (m.w * m.scale)[: 3 * DIM], m.b[: 3 * DIM] + 1))


@brought("model", "a standardized weight")
def standardized() -> None:
    works(lambda m, x: F.linear(x, F.layer_norm(m.w, (DIM,))[: 3 * DIM] * 0.2, m.b[: 3 * DIM]))


@brought("model", "a bias that depends on the input")
def computed_bias() -> None:
    works(lambda m, x: F.linear(x, m.w[: 3 * DIM], m.b[: 3 * DIM] * x.mean()), bias=True)


@brought("model", "one weight for two projections")
def shared() -> None:
    def project(m: Any, x: Tensor) -> Tensor:
        once = F.linear(x, m.w[:DIM], m.b[:DIM])
        return torch.stack([once, F.linear(x * 0.5, m.w[:DIM]), F.linear(once, m.w[:DIM])], 2)

    works(project)


@brought("model", "a product with the parameter on the left")
def parameter_on_the_left() -> None:
    works(lambda m, x: (m.w[: 3 * DIM] @ x.transpose(1, 2)).transpose(1, 2))


class Temperature(nn.Module):
    """A layer called as scales per head of this package are, with a parameter `scale`, and a buffer `codes`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("codes", torch.arange(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return torch.div(self.linear(x), self.scale) + self.codes


class Tempered(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.cls_head = Temperature()

    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        y: Tensor = self.cls_head(x)
        return y


@brought("model", "parameters called as this package calls its own: head.scale, codes")
def own_names() -> None:
    pipeline(Tempered().eval(), pictures())


class Tied(nn.Module):
    """A patch embedding whose kernel is computed by einsum, and a head that is the embedding transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(DIM, 5)), nn.Parameter(torch.randn(5, 3 * 64) * 0.1)
        self.middle = nn.Linear(DIM, DIM)
        self.output = nn.Linear(DIM, DIM)
        self.output.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("or,rk->ok", self.a, self.b).reshape(DIM, 3, 8, 8)
        x = F.conv2d(x, kernel, stride=8).flatten(2).transpose(1, 2)
        return self.output(self.middle(x).relu()).mean(1) @ self.a


@brought("model", "a kernel by einsum, tied layers, a product with a bare parameter")
def tied() -> None:
    pipeline(Tied().eval(), pictures())
