"""Activations: each with its own negative range, found behind both tracers, lowered to what is simulated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.activations import NEGATIVE_RANGE
from ptq4vit_fx.api import prepare_traced
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.passes.trace_by_export import trace_by_export

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def exported(model):
    """A graph of torch.export at the stage that trace leaves."""
    graph_module = trace(nn.Identity())
    by_export = trace_by_export(model, (X,))
    by_export.meta.update(graph_module.meta)
    return by_export


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("silu", F.silu),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("hardswish", F.hardswish),
        ("mish", F.mish),
        ("relu", F.relu),
        ("sigmoid", torch.sigmoid),
        ("softmax", lambda x: F.softmax(x, 0)),
    ],
)
def test_negative_ranges_are_the_minima_of_the_functions(name, function):
    values = function(torch.linspace(-30, 30, 6_000_001, dtype=torch.float64))
    assert -float(values.min().clamp_max(0)) == pytest.approx(NEGATIVE_RANGE[name], abs=1e-10)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "quick gelu": (QuickGELU(), "quick_gelu"),
    "quick gelu, the other way round": (lambda x: torch.sigmoid(x * 1.702).mul(x), "quick_gelu"),
    "another factor": (lambda x: x * torch.sigmoid(1.5 * x), None),
    "swish written out": (lambda x: x * x.sigmoid(), "silu"),
    "silu module in place": (nn.SiLU(inplace=True), "silu"),
    "silu": (F.silu, "silu"),
    "hardswish": (nn.Hardswish(), "hardswish"),
    "mish": (F.mish, "mish"),
    "mish module": (nn.Mish(), "mish"),
    "mish module in place": (nn.Mish(inplace=True), "mish"),
    "tanh gelu": (nn.GELU("tanh"), "gelu_tanh"),
    "relu method": (lambda x: x.relu(), "relu"),
    "relu module": (nn.ReLU(), "relu"),
    "relu6": (nn.ReLU6(inplace=True), "relu"),
    "sigmoid": (nn.Sigmoid(), "sigmoid"),
    "gated by another": (lambda x: x * torch.sigmoid(x.flip(-1)), None),
    "swiglu": (lambda x: F.silu(x) * x, None),
    "shifted": (lambda x: F.silu(x) + 1, None),
    "tanh": (torch.tanh, None),
}


class Activated(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.function = nn.Linear(8, 16), nn.Linear(16, 4), function

    def forward(self, x):
        return self.b(self.function(self.a(x))).mean((1, 2))


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations_choose_the_quantizer(case, tracer):
    function, source = ACTIVATIONS[case]
    model = Activated(function).eval()
    graph = trace(model) if tracer == "fx" else exported(model)
    prepared = prepare_traced(graph, ptq.recipes.ptq4vit(), (X,))
    assert prepared.plan.op("b").lhs_source == source
    assert torch.equal(prepared(X), model(X))
    expected: ptq.Uniform | ptq.TwinUniform = ptq.Uniform(8)
    if source is not None and NEGATIVE_RANGE[source]:
        expected = ptq.TwinUniform(8, form="gelu", minimum=NEGATIVE_RANGE[source])
    elif source is not None:
        expected = ptq.Uniform(8, signed=False)
    assert prepared.plan.quantizers["b:lhs"] == expected


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), QuickGELU()])
def test_lowered_activations_compute_what_is_simulated(activation, bits, tmp_path):
    model = Activated(activation).eval()
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    converted = ptq.quantize(model, images, qconfig_mapping=ptq.recipes.ptq4vit(8, bits), progress=False)
    error = (converted(images) - model(images)).norm() / model(images).norm()
    assert error < {8: 0.01, 6: 0.03, 4: 0.12}[bits]
    ptq.export_onnx(converted, tmp_path / "model.onnx", images[:1])
    assert ptq.verify_onnx(tmp_path / "model.onnx", converted, images).simulation.cosine > 0.9999


def test_both_tracers_give_the_same_plan(small_vit, small_images):
    mapping = ptq.recipes.ptq4vit()
    plans = []
    for graph in (trace(small_vit), trace_by_export(small_vit, (small_images[:1],))):
        graph.meta.update(trace(nn.Identity()).meta)
        plans.append(prepare_traced(graph, mapping, (small_images[:1],)).plan)
    assert plans[0] == plans[1]
