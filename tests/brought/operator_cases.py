"""Operators that nothing looks into, or that ONNX lacks, and forwards that fix the number of images."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import ptq4vit_fx as ptq
from brought import brought
from brought.attention_cases import DIM, HEADS, Tokens
from brought.pipeline import QUICK, pictures, pipeline, vit
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.stages import float_products


@torch.library.custom_op("brought::attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


@fused_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


fused_attention.register_autograd(lambda _, gradient: (gradient, gradient, gradient))


@torch.library.custom_op("brought::soft_sign", mutates_args=())
def soft_sign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@soft_sign.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


soft_sign.register_autograd(lambda _, gradient: gradient)


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


@torch.fx.wrap
def in_numpy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q.detach().numpy() @ k.detach().numpy().swapaxes(-2, -1) * 0.1
    return torch.from_numpy(a @ v.detach().numpy())


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return by_torch(q, k, v)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient, gradient, gradient


class Called(Tokens):
    """Attention by a function of q, k and v; `name` says which, since functions of extensions are not copied."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.qkv, self.name = nn.Linear(DIM, 3 * DIM), name

    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return FUNCTIONS[self.name](q, k, v).transpose(1, 2).flatten(2)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "operator": torch.ops.brought.attention,
    "numpy": lambda q, k, v: in_numpy(q, k, v),  # noqa: PLW0108 - found when it is called: it is wrapped then
    "function": Function.apply,
    "checkpoint": lambda q, k, v: checkpoint(by_torch, q, k, v, use_reentrant=False),
    "activation": lambda q, k, v: F.scaled_dot_product_attention(torch.ops.brought.soft_sign(q), k, v),
}


def converted_with_warnings(name: str) -> tuple[GraphModule, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prepared = ptq.prepare_fx(Called(name).eval(), QUICK, pictures(1))
    ptq.calibrate(prepared, pictures(), progress=False)
    return ptq.convert_fx(prepared), [str(item.message) for item in said if item.category is ptq.PTQWarning]


@brought("model", "attention in an operator of an extension: float, with a warning", quick=True)
def custom_operator() -> None:
    converted, said = converted_with_warnings("operator")
    (product,) = plan_of(converted).float_ops
    assert product.reason == "brought::attention is an operator that cannot be looked into"
    assert product in float_products(converted)
    assert len(said) == 1
    assert "brought::attention" in said[0]


@brought("model", "attention in NumPy: float, with a warning")
def numpy_function() -> None:
    (product,) = plan_of(ptq.prepare_fx(Called("numpy").eval(), QUICK, pictures(1))).float_ops
    assert product.reason.startswith("in_numpy is an operator that cannot be looked into")


@brought("model", "attention in a torch.autograd.Function")
def autograd_function() -> None:
    assert not plan_of(pipeline(Called("function").eval(), pictures())).float_ops


@brought("model", "attention in torch.utils.checkpoint")
def checkpointed() -> None:
    assert not plan_of(pipeline(Called("checkpoint").eval(), pictures())).float_ops


@brought("model", "an activation of an extension: no product, so no warning")
def custom_activation() -> None:
    converted, said = converted_with_warnings("activation")
    assert not plan_of(converted).float_ops
    assert not said


def export(converted: GraphModule, **arguments: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ptq.export_onnx(converted, Path(folder) / "model.onnx", pictures(1), **arguments)


@brought("file", "an operator that ONNX does not have", refused="got brought::attention; write it out", quick=True)
def unknown_operator() -> None:
    export(converted_with_warnings("operator")[0])


class Reshaped(nn.Module):
    """A forward that is written for two images, inside of a module."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.reshape(2, 17, DIM)).mean(1)

    def __init__(self) -> None:
        super().__init__()
        self.net, self.classes = vit(num_classes=0), self.Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.net.forward_features(x))


def converted_of_two_images() -> GraphModule:
    prepared = ptq.prepare_fx(Reshaped().eval(), QUICK, pictures(2))
    ptq.calibrate(prepared, list(pictures().split(2)), progress=False)
    return ptq.convert_fx(prepared)


@brought("file", "a forward for two images alone, a file of any batch", refused="module 'classes', ", quick=True)
def any_batch_of_two() -> None:
    export(converted_of_two_images())


@brought("file", "a forward for two images alone, a file of three", refused="pass batch=2, the number of images that")
def three_of_two() -> None:
    export(converted_of_two_images(), batch=3)


@brought("file", "a forward for two images alone, a file of two")
def two_of_two() -> None:
    export(converted_of_two_images(), batch=2)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = vit()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.special.bessel_j0(x.mean((1, 2, 3)))[:, None]


@brought("file", "a function of torch that ONNX does not have", refused="got prims::bessel_j0; write it out")
def unknown_function() -> None:
    pipeline(Unknown().eval(), pictures())


class Pooled(nn.Module):
    """Tokens of a transformer, pooled by a function of the case's choice, and a vector as its parameter."""

    def __init__(self, pool: Callable[[Tensor, Tensor], Tensor], length: int, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.pool, self.layer = vit(num_classes=0), pool, layer
        self.vector = nn.Parameter(torch.randn(length, generator=torch.Generator().manual_seed(3)))
        self.head = nn.Linear(48, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.net.forward_features(x), self.vector))  # type: ignore[no-any-return]


def by_attention(tokens: Tensor, vector: Tensor) -> Tensor:
    weights = (tokens @ vector).softmax(-1)
    return (weights[:, None] @ tokens)[:, 0]


@brought("model", "attention pooling with one query, a vector: tokens @ self.query", quick=True)
def tokens_by_a_vector() -> None:
    plan = plan_of(pipeline(Pooled(by_attention, 48).eval(), pictures()))
    assert not plan.float_ops
    assert len(plan.ops) == 16


@brought("model", "a vector in front of the tokens: self.weights.softmax(0) @ tokens")
def vector_by_tokens() -> None:
    plan = plan_of(pipeline(Pooled(lambda tokens, v: v.softmax(0) @ tokens, 17).eval(), pictures()))
    assert len(plan.ops) == 15


@brought("model", "an nn.LSTM over the tokens: runs in float, listed")
def lstm() -> None:
    class Model(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.net.forward_features(x))[0][:, -1])  # type: ignore[no-any-return, misc]

    model = Model(by_attention, 1, nn.LSTM(48, 48, batch_first=True))
    (product,) = plan_of(pipeline(model.eval(), pictures())).float_ops
    assert (product.name, product.reason) == ("layer", "LSTM is not supported")


@brought("model", "an nn.Bilinear head: runs in float, listed")
def bilinear() -> None:
    class Model(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            f = self.net(x)
            return self.layer(f, f)  # type: ignore[no-any-return, misc]

    (product,) = plan_of(pipeline(Model(by_attention, 1, nn.Bilinear(48, 48, 7)).eval(), pictures())).float_ops
    assert (product.name, product.reason) == ("layer", "Bilinear is not supported")


@brought("model", "a head of prototypes: torch.cdist of the features, for any batch", quick=True)
def distances_to_prototypes() -> None:
    class Model(Pooled):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(by_attention, 1)
            self.prototypes = nn.Parameter(torch.randn(7, 48, generator=torch.Generator().manual_seed(4)))
            self.arguments = arguments

        def forward(self, x: Tensor) -> Tensor:
            return -torch.cdist(self.net(x), self.prototypes, **self.arguments)

    (product,) = plan_of(pipeline(Model().eval(), pictures(30))).float_ops
    assert product.name == "cdist"
    pipeline(Model(p=2.0, compute_mode="use_mm_for_euclid_dist_if_necessary").eval(), pictures())
    pipeline(Model(compute_mode="use_mm_for_euclid_dist").eval(), pictures())
    pipeline(Model(p=1.0).eval(), pictures())
