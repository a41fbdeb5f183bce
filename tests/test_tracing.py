"""Tracing and planning: timm's ViT, DeiT and Swin from a plain constructor, and every spelling of an activation."""

from __future__ import annotations

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.trace import trace

MODELS = {
    "vit_tiny_patch16_224": 12,
    "deit_tiny_patch16_224": 12,
    "deit_tiny_distilled_patch16_224": 12,
    "swin_tiny_patch4_window7_224": 12,
}


@pytest.fixture(params=[True, False], ids=["fused", "unfused"])
def fused(request):
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(request.param, experimental=True)  # timm calls Swin's experimental
    yield request.param
    timm.layers.set_fused_attn(before)


@pytest.mark.parametrize("name", MODELS)
def test_plain_timm_models_trace_bit_equal_and_every_product_is_planned(name, fused):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(4, 3, 224, 224)
    traced = trace(model)
    prepared = ptq.prepare_fx(model, ptq.recipes.ptq4vit(), images[:1])
    assert any(node.target is F.scaled_dot_product_attention for node in traced.graph.nodes) == fused
    assert not any(node.target is F.scaled_dot_product_attention for node in prepared.graph.nodes)
    with torch.inference_mode():
        for batch in (1, 4):
            expected = model(images[:batch])
            assert torch.equal(traced(images[:batch]), expected)
            observed = prepared(images[:batch])
            if fused:  # the fused kernel sums in another order than the products that it is opened into
                torch.testing.assert_close(observed, expected, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(observed, expected)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    attentions = MODELS[name]
    plan = prepared.plan
    assert {op.name for op in plan.ops if op.kind != "matmul"} == set(layers)
    assert sum(op.kind == "matmul" for op in plan.ops) == 2 * attentions
    assert sum(op.lhs_source == "softmax" for op in plan.ops) == attentions
    assert sum(op.lhs_source == "gelu" for op in plan.ops) == attentions
    assert not plan.float_ops


class Spelled(nn.Module):
    """Attention and MLP on (batch, 1, tokens, dim), its softmax and GELU written in a chosen way."""

    def __init__(self, softmax, gelu, between) -> None:
        super().__init__()
        self.qkv, self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 3)
        self.softmax, self.gelu, self.between = softmax, gelu, between

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = self.between(self.softmax(q @ k.transpose(-2, -1))) @ v
        return self.fc2(self.between(self.gelu(self.fc1(x)))).mean((1, 2))


class Moves(nn.Module):
    def forward(self, x):
        x = x.reshape(x.shape[0], x.shape[1], -1).unflatten(2, (x.shape[2], x.shape[3]))
        return x.transpose(1, 2).transpose(1, 2).contiguous()


SOFTMAX = {
    "module": nn.Softmax(dim=-1),
    "functional": lambda x: F.softmax(x, dim=-1),
    "torch": lambda x: torch.softmax(x, -1),
    "method": lambda x: x.softmax(dim=-1),
}
GELU = {
    "module": (nn.GELU(), "gelu"),
    "functional": (F.gelu, "gelu"),
    "tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
}
BETWEEN = {
    "nothing": nn.Identity(),
    "dropout": nn.Dropout(0.5),
    "functional dropout": lambda x: F.dropout(x, 0.5, training=False),
    "drop path": DropPath(0.5),
    "moves": Moves(),
    "all": nn.Sequential(nn.Dropout(0.1), Moves(), nn.Identity()),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("gelu", GELU)
@pytest.mark.parametrize("softmax", SOFTMAX)
def test_every_spelling_is_recognized(softmax, gelu, between):
    torch.manual_seed(0)
    function, source = GELU[gelu]
    model = Spelled(SOFTMAX[softmax], function, BETWEEN[between]).eval()
    images = torch.randn(2, 1, 5, 8)
    prepared = ptq.prepare_fx(model, ptq.recipes.ptq4vit(), images)
    assert torch.equal(prepared(images), model(images))
    sources = {op.name: op.lhs_source for op in prepared.plan.ops}
    assert sources == {"qkv": None, "matmul_qk": None, "matmul_av": "softmax", "fc1": None, "fc2": source}


def test_an_operand_that_was_changed_after_softmax_is_no_twin():
    model = Spelled(lambda x: torch.softmax(x, -1) - 0.5, lambda x: F.gelu(x) + 1.0, nn.Identity()).eval()
    plan = ptq.prepare_fx(model, ptq.recipes.ptq4vit(), torch.randn(2, 1, 5, 8)).plan
    assert all(op.lhs_source is None for op in plan.ops)
