"""Each pass: it fires, it leaves the near miss alone, and the numbers stay what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import count, model_of
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.canonicalize import canonicalize
from ptq4vit_fx.passes.decompose_attention import decompose_attention
from ptq4vit_fx.passes.graph.contract import plan_of, stage_of
from ptq4vit_fx.passes.graph.marks import planned_product
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, INTEGER_MATMUL
from ptq4vit_fx.passes.graph.shapes import record_shapes
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.remove_identities import remove_identities
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.passes.write_qdq import write_qdq


def traced(function, **modules):
    return trace(model_of(function, **modules))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "modules", "rewrites"),
    [
        (lambda m, x: m.a(x), {"a": nn.Dropout(0.5)}, 1),
        (lambda m, x: m.a(m.b(x)), {"a": nn.Identity(), "b": nn.Dropout2d(0.5)}, 2),
        (lambda m, x: F.dropout(x, 0.5, training=False), {}, 1),
        (lambda m, x: F.dropout(x, 0.0, training=True), {}, 1),
        (lambda m, x: F.dropout(x, 0.5, training=True), {}, 0),  # active: not an identity
        (lambda m, x: m.a(x), {"a": nn.ReLU()}, 0),
    ],
)
def test_remove_identities(function, modules, rewrites):
    graph = traced(function, **modules)
    torch.manual_seed(1)
    before = graph(X)
    remove_identities(graph)
    assert count(graph) == rewrites
    torch.manual_seed(1)
    assert torch.equal(graph(X), before)


CANONICAL: dict[str, Any] = {
    "linear": (lambda m, x: m.a(x), {"a": nn.Linear(8, 4)}, F.linear),
    "conv": (lambda m, x: m.a(x), {"a": nn.Conv2d(3, 4, 3, padding=1)}, F.conv2d),
    "layer norm": (lambda m, x: m.a(x), {"a": nn.LayerNorm(8)}, F.layer_norm),
    "softmax": (lambda m, x: x.softmax(-1), {}, F.softmax),
    "gelu": (lambda m, x: m.a(x), {"a": nn.GELU("tanh")}, F.gelu),
    "operator": (lambda m, x: x @ x, {}, torch.matmul),
    "method": (lambda m, x: x.matmul(x), {}, torch.matmul),
    "bmm": (lambda m, x: torch.bmm(x[0], x[0]), {}, torch.matmul),
}


@pytest.mark.parametrize("case", CANONICAL)
def test_canonicalize(case):
    function, modules, target = CANONICAL[case]
    graph = traced(function, **modules)
    before = graph(X)
    canonicalize(graph)
    assert target in [node.target for node in graph.graph.nodes]
    assert count(graph) == 1
    assert torch.equal(graph(X), before)


@pytest.mark.parametrize(
    ("function", "modules"),
    [
        (lambda m, x: m.a(x), {"a": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")}),
        (lambda m, x: F.log_softmax(x, -1), {}),
        (lambda m, x: x * x, {}),
    ],
)
def test_canonicalize_leaves_near_misses_alone(function, modules):
    graph = traced(function, **modules)
    before = graph(X)
    canonicalize(graph)
    assert count(graph) == 0
    assert torch.equal(graph(X), before)


SCORES = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mask", [None, SCORES, SCORES > 0], ids=["none", "float", "boolean"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_decompose_attention(mask, scale):
    graph = traced(lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=scale))
    before = graph(X)
    record_shapes(graph, (X,))
    decompose_attention(graph)
    assert count(graph) == 1
    assert F.softmax in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(X), before)


def test_views_behind_an_opened_attention_may_copy():
    graph = traced(lambda m, x: F.scaled_dot_product_attention(x, x, x).view(2, 3, 64))
    before = graph(X)
    record_shapes(graph, (X,))
    decompose_attention(graph)
    assert [node.target for node in graph.graph.nodes if node.op == "call_method"] == ["reshape"]
    torch.testing.assert_close(graph(X), before)
    without = traced(lambda m, x: x.view(2, 192))
    decompose_attention(without)
    assert [node.target for node in without.graph.nodes if node.op == "call_method"] == ["view"]


def fused(**arguments):
    """Return (eager, opened) outputs of one fused attention, and the functions that the opened graph calls."""
    graph = traced(lambda m, x: F.scaled_dot_product_attention(x, x, x, **arguments))
    before = graph(X)
    record_shapes(graph, (X,))
    decompose_attention(graph)
    return before, graph(X), [node.target for node in graph.graph.nodes]


def keep_no_key_of_row_2(dtype):
    mask = (SCORES > -0.5).index_fill(0, torch.tensor(2), False)
    return mask if dtype == torch.bool else torch.zeros(8, 8).masked_fill(~mask, float("-inf"))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_row_without_keys_is_zero_as_in_the_fused_attention(dtype):
    before, after, _ = fused(attn_mask=keep_no_key_of_row_2(dtype))
    assert (before[..., 2, :] == 0).all()
    assert (after[..., 2, :] == 0).all()
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("mask", [SCORES, SCORES > -9, SCORES.clamp_min(torch.finfo(torch.float32).min)])
def test_a_constant_mask_that_leaves_keys_costs_nothing(mask):
    assert torch.masked_fill not in fused(attn_mask=mask)[2]


def test_causal_attention():
    before, after, called = fused(is_causal=True)
    torch.testing.assert_close(after, before)
    assert torch.masked_fill not in called


def test_dropout_in_evaluation_is_refused():
    graph = traced(lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1))
    with pytest.raises(ptq.PTQError, match=r"expected no dropout in evaluation mode, got dropout_p=0.1"):
        decompose_attention(graph)


def test_passes_refuse_the_wrong_order():
    graph = traced(lambda m, x: m.a(x), a=nn.Linear(8, 4))
    canonicalize(graph)
    with pytest.raises(ptq.PTQError, match=r"pass remove_identities: graph after trace, canonicalize"):
        remove_identities(graph)


def test_write_qdq_is_the_same_product_in_float(small_converted, small_images):
    converted = small_converted
    products = [planned_product(node) for node in converted.graph.nodes if node.target is INTEGER_MATMUL]
    twins = sum(isinstance(quantizer, ptq.TwinUniform) for quantizer in converted.plan.quantizers.values())
    assert len(products) == len(plan_of(converted).ops) + twins
    assert DEQUANTIZE not in [node.target for node in converted.graph.nodes]
    qdq = write_qdq(copy.deepcopy(converted))
    assert stage_of(qdq) is Stage.QDQ
    assert [planned_product(node) for node in qdq.graph.nodes if node.target is torch.matmul] == products
    assert torch.cosine_similarity(qdq(small_images), converted(small_images)).min() > 0.99999


class Overlapping(nn.Module):
    """A stem convolution that overlaps, a patch embedding, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.patches, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.patches(F.gelu(self.stem(x))).flatten(2).mean(-1))


def test_patch_convolution_becomes_a_product_and_an_overlapping_one_does_not():
    torch.manual_seed(0)
    model = Overlapping().eval()
    for recipe, products in ((ptq.recipes.ptq4vit(), 3), (ptq.recipes.best(), 2)):  # patches, a twin's two; head
        converted = ptq.quantize(model, X, qconfig_mapping=recipe, progress=False)
        assert sum(node.target is INTEGER_MATMUL for node in converted.graph.nodes) == products
        assert sum(node.target is F.conv2d for node in converted.graph.nodes) == 1
        error = (converted(X) - model(X)).norm() / model(X).norm()
        assert error < 0.02
