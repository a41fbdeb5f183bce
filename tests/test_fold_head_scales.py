"""Scales per head go into the projection: the same codes without a division, and only where nothing else reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Interpreter

import ptq4vit_fx as ptq
from ptq4vit_fx import api
from ptq4vit_fx.names import site_of
from ptq4vit_fx.passes.fold_head_scales import fold_head_scales
from ptq4vit_fx.passes.graph.contract import history
from ptq4vit_fx.passes.graph.marks import scope_of
from ptq4vit_fx.passes.graph.operators import QUANTIZE
from ptq4vit_fx.pipeline import CONVERSION
from ptq4vit_fx.quantizers import UniformParams

HEADS, DIM = 3, 4
X = torch.randn(4, HEADS * DIM, 2, 3, generator=torch.Generator().manual_seed(0))


def heads_of(x):
    return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


class Attention(nn.Module):
    """Attention with one projection or three; `also` says which of q, k and v somebody else reads."""

    def __init__(self, *, fused: bool, bias: bool = True, also: str = "", shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        width = HEADS * DIM
        if fused:
            self.qkv = nn.Linear(width, 3 * width, bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, bias) for _ in range(3))
        self.fused, self.also, self.shared = fused, also, shared

    def forward(self, images):
        x = images.flatten(2).transpose(1, 2)
        if self.fused:
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = heads_of(self.q(x)), heads_of(self.k(x)), heads_of(self.v(x))
        v = v.expand_as(k)  # reads the shape of k, not its values
        k = q if self.shared else k
        out = torch.softmax((q * 0.5) @ k.transpose(-2, -1), -1) @ v
        if self.also:
            out = out + {"q": q, "k": k, "v": v}[self.also].sigmoid()
        return out.transpose(1, 2).flatten(2).mean(1)


def calibrated_model(model, *, weights="channel", bits=8):
    """Calibrate with scales per head that differ by up to a factor of 50, so that a wrong head or column shows."""
    prepared = ptq.prepare_fx(model.eval(), ptq.recipes.ptq4vit(bits, bits, weights), X)
    calibration = ptq.calibrate(prepared, X, progress=False)
    params: dict[str, Any] = dict(calibration.params)
    for number, (name, quantizer) in enumerate(calibration.plan.quantizers.items()):
        if getattr(quantizer, "granularity", "") == "head":
            factors = torch.tensor([1.0, 7.0, 50.0]).roll(number) / 10
            params[name] = UniformParams(params[name].tensors()["scale"] * factors, params[name].axis)
    return ptq.load_calibration(prepared, ptq.Calibration(calibration.plan, params))


def converted_model(model, **kwargs):
    return ptq.convert_fx(calibrated_model(model, **kwargs))


def codes_of(converted):
    """Return site -> codes that the model computes for X."""
    found: dict[tuple[str, int], torch.Tensor] = {}

    class Recorder(Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.target is QUANTIZE:
                found[site_of(scope_of(n)), len(found)] = result.int()
            return result

    with torch.inference_mode():
        Recorder(converted).run(X)
    return {site: codes for (site, _), codes in found.items() if "matmul" in site or "att" in site}


def folded(converted):
    return next(rewrite.count for rewrite in history(converted) if rewrite.name == "fold_head_scales")


def divisions(converted):
    return sum(node.target is torch.div for node in converted.graph.nodes)


def unfolded(monkeypatch, model, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(api, "CONVERSION", CONVERSION.without("fold_head_scales"))
        return converted_model(model, **kwargs)


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("weights", ["channel", "group"])
@pytest.mark.parametrize("kwargs", [{"fused": True}, {"fused": False}, {"fused": False, "bias": False}])
def test_the_codes_are_those_of_a_division(monkeypatch, kwargs, weights, bits):
    model = Attention(**kwargs)
    mine = converted_model(model, weights=weights, bits=bits)
    reference = unfolded(monkeypatch, model, weights=weights, bits=bits)
    assert folded(mine) == 3
    assert (divisions(mine), divisions(reference)) == (0, 3)
    assert not any(0.5 in node.args for node in mine.graph.nodes)  # the factor of attention went the same way
    theirs = codes_of(reference)
    assert theirs.keys() == codes_of(mine).keys()
    for site, codes in codes_of(mine).items():
        difference = (codes - theirs[site]).abs()
        assert difference.max() <= 1, site
        assert (difference == 0).float().mean() > 0.99, site  # a value on the edge of two codes may fall to the other
    torch.testing.assert_close(mine(X), reference(X), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("also", ["q", "k", "v"])
def test_a_projection_that_something_else_reads_is_left_alone(monkeypatch, also):
    for fused, left in ((True, 0), (False, 2)):
        model = Attention(fused=fused, also=also)
        converted = converted_model(model)
        assert (folded(converted), divisions(converted)) == (left, 3 - left)
        torch.testing.assert_close(converted(X), unfolded(monkeypatch, model)(X), rtol=0.02, atol=0.02)


def test_a_column_with_two_scales_is_left_alone(monkeypatch):
    model = Attention(fused=False, shared=True)
    converted = converted_model(model)
    assert (folded(converted), divisions(converted)) == (1, 2)  # v; q is divided by the scales of either operand
    torch.testing.assert_close(converted(X), unfolded(monkeypatch, model)(X), rtol=1e-5, atol=1e-6)


def test_a_second_run_finds_nothing():
    lowered = CONVERSION.until("fold_head_scales").run(calibrated_model(Attention(fused=True)))
    assert folded(lowered) == 3
    before = lowered(X)
    assert torch.equal(fold_head_scales(lowered)(X), before)
    assert history(lowered)[-1].count == 0
