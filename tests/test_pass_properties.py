"""Properties of the passes on random small graphs: prepared is the model, converted is it but for quantization.

A graph is a chain of random operations on tokens, each in one of the spellings that models use. Products are exact in
float, so a prepared graph must give the model's own bits; the error of the converted one is bounded by the steps of its
quantizers, which at 8 bits is a few hundredths of the output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from graphs import QUICK
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.contract import stage_of
from ptq4vit_fx.passes.graph.stages import Stage, check_stage, float_products
from ptq4vit_fx.passes.write_qdq import write_qdq

DIM, HEADS, SIDE = 8, 2, 3
IMAGES = torch.randn(4, DIM, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


class Operations(nn.Module):
    """Every operation that a random graph may have, from tokens (batch, tokens, dim) to tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.wide, self.narrow = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.qkv, self.norm = nn.Linear(DIM, 3 * DIM), nn.LayerNorm(DIM)
        self.gelu, self.relu, self.drop, self.same = nn.GELU(), nn.ReLU(inplace=True), nn.Dropout(), nn.Identity()
        self.pixel = nn.Conv2d(DIM, DIM, 1)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4).unbind(0)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attention(m: Operations, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return joined(((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v)


def fused(m: Operations, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return joined(F.scaled_dot_product_attention(q, k, v))


def by_einsum(m: Operations, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    return joined(torch.einsum("bhqk,bhkd->bhqd", F.softmax(scores, dim=-1), v))


def gated(m: Operations, x: Tensor) -> Tensor:
    value = m.wide(x)
    return m.narrow(value * torch.sigmoid(value))


def convolved(m: Operations, x: Tensor) -> Tensor:
    return m.pixel(x.transpose(1, 2).unflatten(2, (SIDE, SIDE))).flatten(2).transpose(1, 2)


OPERATIONS: dict[str, Callable[[Operations, Tensor], Tensor]] = {
    "linear": lambda m, x: m.linear(x),
    "linear, function": lambda m, x: F.linear(input=x, weight=m.linear.weight, bias=m.linear.bias),
    "gelu": lambda m, x: m.narrow(m.gelu(m.wide(x))),
    "relu in place": lambda m, x: m.narrow(m.relu(m.wide(x))),
    "silu in place": lambda m, x: m.narrow(F.silu(m.wide(x), inplace=True)),
    "gated": gated,
    "norm": lambda m, x: m.norm(x),
    "dropout": lambda m, x: m.same(m.drop(x)),
    "attention": attention,
    "fused attention": fused,
    "einsum": by_einsum,
    "pixel convolution": convolved,
}
#: Opened attention sums in another order than the fused kernel.
REORDERED = {"fused attention", "einsum"}


@dataclass(frozen=True)
class Case:
    """Operations in order, whether each has a residual, and what the head reads."""

    operations: tuple[tuple[str, bool], ...]
    first_token: bool
    seed: int


class Chain(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        self.steps = nn.ModuleList(Operations() for _ in case.operations)
        self.head, self.case = nn.Linear(DIM, 3), case

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)
        for module, (name, residual) in zip(self.steps, self.case.operations, strict=True):
            y = OPERATIONS[name](module, x)  # type: ignore[arg-type]
            x = x + y if residual else y
        return self.head(x[:, 0] if self.case.first_token else x.mean(1))


CASES = st.builds(
    Case,
    st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.booleans()), min_size=1, max_size=4).map(tuple),
    st.booleans(),
    st.integers(0, 9),
)
PROPERTIES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def calibrated(case: Case) -> tuple[nn.Module, torch.fx.GraphModule]:
    model = Chain(case).eval()
    mapping = ptq.recipes.ptq4vit().with_search(**QUICK | {"n": 20})
    prepared = ptq.prepare_fx(model, mapping, IMAGES[:1])
    ptq.calibrate(prepared, IMAGES, progress=False)
    return model, prepared


@PROPERTIES
@given(CASES)
def test_a_prepared_graph_is_the_model(case):
    model = Chain(case).eval().requires_grad_(False)
    prepared = ptq.prepare_fx(model, ptq.recipes.ptq4vit(), IMAGES[:1])
    for batch in (IMAGES[:1], IMAGES):
        if REORDERED.isdisjoint(name for name, _ in case.operations):
            assert torch.equal(prepared(batch.clone()), model(batch.clone()))
        else:
            torch.testing.assert_close(prepared(batch), model(batch), rtol=1e-4, atol=1e-5)


@PROPERTIES
@given(CASES)
@example(Case((("einsum", False), ("einsum", False), ("relu in place", False)), False, 0))
@example(Case((("dropout", True), ("pixel convolution", True), ("dropout", True), ("attention", False)), True, 9))
def test_a_converted_graph_is_the_model_but_for_quantization(case):
    model, prepared = calibrated(case)
    converted = ptq.convert_fx(prepared)
    assert stage_of(converted) is Stage.CONVERTED
    assert not float_products(converted)
    read: list[Tensor] = []
    with model.head.register_forward_pre_hook(lambda _, given: read.append(given[0])):
        exact = model(IMAGES)
    terms = read[0].abs() @ model.head.weight.abs().T  # they may cancel; what quantization does to them does not
    spread = (exact - exact.mean(0)).norm() + 0.1 * terms.norm()
    assert (converted(IMAGES) - exact).norm() < 0.15 * spread
    # What is computed does not depend on how many images are computed together.
    torch.testing.assert_close(converted(IMAGES[:2]), converted(IMAGES)[:2], rtol=1e-4, atol=1e-4)
    qdq = write_qdq(copy.deepcopy(converted))
    check_stage(qdq, Stage.QDQ, pass_name="nothing")
    torch.testing.assert_close(qdq(IMAGES), converted(IMAGES), rtol=0.05, atol=0.05 * float(exact.abs().max()))
