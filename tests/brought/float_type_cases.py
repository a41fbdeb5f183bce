"""Forwards that compute in another type of floats than float32 on their way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptq4vit_fx as ptq
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


class Under(Head):
    """A forward that switches autocast on for its transformer."""

    dtype = torch.bfloat16

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", self.dtype):
            y = super().forward(x)
        return y.float()


def _under_autocast(model: nn.Module, said: str, plain: Callable[[Tensor], Any]) -> None:
    """Take a model through that says so: what it computes without autocast is what is quantized."""
    with pytest.warns(ptq.PTQWarning, match=said) as warned:
        pipeline(model, pictures(), reference=plain)
    assert sum("autocast" in str(warning.message) for warning in warned) == 1
    assert not torch.is_autocast_enabled("cpu")


@brought("tracing", "torch.autocast in a forward: quantized from float32, with a warning", quick=True)
def autocast_in_a_forward() -> None:
    model = Under(lambda f: f).eval()
    _under_autocast(model, "with torch.autocast", lambda x: Head.forward(model, x))
    inside = model(pictures())
    assert not torch.equal(inside, Head.forward(model, pictures())), "the user's own calls compute without it"


@brought("tracing", "autocast as a decorator, in float16, around a block, by hand; switched off")
def other_autocasts() -> None:
    class Decorated(Head):
        forward = torch.autocast("cpu", torch.bfloat16)(Head.forward)

    model: Any = Decorated(lambda f: f).eval()
    _under_autocast(model, "a decorator of its forward", lambda x: Head.forward(model, x))
    half = Under(lambda f: f).eval()
    half.dtype = torch.float16
    _under_autocast(half, "torch.float16", lambda x: Head.forward(half, x))
    model = Head(lambda f: f).eval()
    plain = copy.deepcopy(model)
    block = model.net.blocks[1]
    block.forward = torch.autocast("cpu", torch.bfloat16)(block.forward)
    _under_autocast(model, "autocast", plain)

    class ByHand(Head):
        def forward(self, x: Tensor) -> Any:
            torch.set_autocast_enabled("cpu", True)
            try:
                return super().forward(x).float()
            finally:
                torch.set_autocast_enabled("cpu", False)

    by_hand = ByHand(lambda f: f).eval()
    _under_autocast(by_hand, r'torch.set_autocast_enabled\("cpu", True\)', lambda x: Head.forward(by_hand, x))
    off = Head(lambda f: torch.autocast("cpu", torch.bfloat16, enabled=False)(torch.exp)(f * 0.1)).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*autocast")
        pipeline(off, pictures())
