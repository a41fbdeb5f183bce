"""Forwards that compute in another type of floats than float32 on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brought import brought
from brought.pipeline import pictures, pipeline, sum_of_squares, vit
from ptq4vit_fx.passes.graph.contract import plan_of


class Head(nn.Module):
    """A linear head behind what a case makes of the features of a ViT."""

    def __init__(self, between: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.between, self.head = vit(num_classes=0), between, nn.Linear(48, 7)
        self.weight, self.offset = nn.Parameter(torch.randn(48, 48)), nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.between(self.net(x)))


@brought("tracing", "softmax, layer_norm and GELU in float64", quick=True)
def functions_in_double() -> None:
    def between(f: Tensor) -> Tensor:
        f = F.gelu(f.double()) + f.double().softmax(-1) + f.softmax(-1, dtype=torch.float64)
        return F.layer_norm(f, (48,)).float()

    pipeline(Head(between).eval(), pictures())


@brought("tracing", "softmax, layer_norm and GELU in float16")
def functions_in_half() -> None:
    def between(f: Tensor) -> Tensor:
        f = F.gelu(f.half()) + f.half().softmax(-1) + f.softmax(-1, dtype=torch.float16)
        return F.layer_norm(f, (48,)).float()

    pipeline(Head(between).eval(), pictures())


@brought("tracing", "softmax, layer_norm and GELU in bfloat16")
def functions_in_bfloat16() -> None:
    def between(f: Tensor) -> Tensor:
        f = F.gelu(f.bfloat16()) + f.bfloat16().softmax(-1)
        return F.layer_norm(f, (48,)).float()

    pipeline(Head(between).eval(), pictures())


@brought("tracing", "functions in float64 that ONNX Runtime has in float32 alone")
def rare_functions_in_double() -> None:
    def between(f: Tensor) -> Tensor:
        f = F.mish(f.double()) + F.hardswish(f.double()) + torch.erf(f.double()) + F.elu(f.double())
        return F.avg_pool1d(f[:, None], 3, 1, 1)[:, 0].float()

    pipeline(Head(between).eval(), pictures())


def _product(dtype: torch.dtype) -> None:
    class Model(Head):
        def forward(self, x: Tensor) -> Any:
            f = F.linear(self.net(x).to(dtype), self.weight.to(dtype), self.offset.to(dtype))
            f = f @ self.weight.to(dtype)
            return self.head(f.float())

    converted = pipeline(Model(lambda f: f).eval(), pictures())
    assert (len(plan_of(converted).ops), plan_of(converted).float_ops) == (16, ())


@brought("tracing", "products in float64", quick=True)
def products_in_double() -> None:
    _product(torch.float64)


@brought("tracing", "products in float16")
def products_in_half() -> None:
    _product(torch.float16)


@brought("tracing", "products in bfloat16")
def products_in_bfloat16() -> None:
    _product(torch.bfloat16)


@brought("tracing", "attention in float16 behind float32 projections")
def attention_in_half() -> None:
    class Model(Head):
        def forward(self, x: Tensor) -> Any:
            f: Tensor = self.net.forward_features(x)
            y = f.half().reshape(len(f), -1, 3, 16).transpose(1, 2)
            f = f + F.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2).float()
            return self.head(f.mean(1))

    pipeline(Model(lambda f: f).eval(), pictures())


@brought("tracing", "logits in float64")
def logits_in_double() -> None:
    class Model(Head):
        def forward(self, x: Tensor) -> Any:
            return self.head(self.net(x)).double().softmax(-1)

    pipeline(Model(lambda f: f).eval(), pictures(), loss=sum_of_squares)
