"""What is quantized computes what the model computes: the comparison, the copies that tracers get, what they leave."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.behaviour import behaviour_of, distance, other_rows
from ptq4vit_fx.passes.graph.causes import said
from ptq4vit_fx.passes.graph.contract import history
from ptq4vit_fx.passes.graph.model_call import call_of
from ptq4vit_fx.passes.graph.model_copy import another_copy, float_copy
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.passes.trace_by_export import trace_by_export

QUICK = ptq.recipes.ptq4vit()


def test_distance_is_relative_and_sees_what_became_infinite():
    x = torch.tensor([3.0, 4.0])
    assert distance((x,), (x,)) == 0
    assert distance((x * 1.01,), (x,)) == pytest.approx(0.01, rel=1e-4)
    assert distance((x, x * 2), (x, x)) == pytest.approx(1)
    assert distance((torch.tensor([3.0, float("nan")]),), (x,)) == float("inf")
    assert distance((torch.tensor([3.0, 9.0]),), (torch.tensor([3.0, float("nan")]),)) == 0
    assert distance((x, x * 1e-12), (x, x * 0)) < 1e-8
    assert distance((torch.arange(9),), (torch.arange(9) + 1,)) == float("inf")
    assert distance((torch.tensor([1, 2, 4]),), (torch.tensor([1, 2, 3]),)) == 0  # a tie, perhaps


@pytest.mark.parametrize("example", [torch.randn(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.ones(4, 2)])
def test_the_second_batch_has_another_size_and_rows_that_differ(example):
    (rows,) = other_rows((example,))
    assert len(rows) not in (len(example), 1)
    assert rows.shape[1:] == example.shape[1:]
    assert all(not torch.equal(rows[0], row) for row in rows[1:])
    tokens, mask = other_rows((torch.arange(6).reshape(1, 6), torch.ones(1, 6, dtype=torch.bool)))
    assert torch.equal(tokens, torch.arange(6).expand(3, 6))
    assert mask.all()


def test_a_graph_that_computes_something_else_is_told(small_vit, small_images):
    behaviour = behaviour_of(small_vit, (small_images[:1],), call_of(small_vit, 1))
    graph = trace(small_vit, (small_images[:1],))
    assert behaviour.difference(graph) is None
    other = copy.deepcopy(graph)
    other.head.weight.data.mul_(1.01)
    assert "differ by" in behaviour.difference(other)
    node = next(n for n in other.graph.nodes if n.op == "output")
    node.args = (next(iter(other.graph.nodes)),)
    other.recompile()
    assert "instead of (1, 5) on a batch of 1" in behaviour.difference(other)


def test_the_other_tracer_is_taken_where_the_first_computes_something_else(small_vit, small_images):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_vit

        def forward(self, x):
            return self.inner(x) if isinstance(x, torch.Tensor) else self.inner(x) * 3

    model = Other().eval()
    prepared = ptq.prepare_fx(model, QUICK, small_images[:1])
    assert history(prepared)[0].name == "trace_by_export"
    torch.testing.assert_close(prepared(small_images), model(small_images), rtol=1e-4, atol=1e-5)


def test_a_pass_that_changes_what_is_computed_is_refused(small_vit, small_images, monkeypatch):
    def broken(mapping, closed=()):
        class Pipeline:
            def run(self, graph_module):
                graph_module.head.bias = nn.Parameter(graph_module.head.bias + 1)

        return Pipeline()

    monkeypatch.setattr("ptq4vit_fx.api.preparation", broken)
    with pytest.raises(ptq.PTQError, match="a prepared graph that computes what the model computes, got outputs that"):
        ptq.prepare_fx(small_vit, QUICK, small_images[:1])


def test_a_model_that_multiplies_the_last_bit_is_no_other_model(small_images):
    class Chaos(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            x = self.fc(x.mean(1).sigmoid()).sigmoid()
            for _ in range(60):
                x = 3.9 * x * (1 - x)  # the logistic map
            return x.mean(1)

    model = Chaos().eval()
    behaviour = behaviour_of(model, (small_images[:1],), call_of(model, 1))
    moved = trace(model)
    moved.fc.bias.data.add_(1e-7)
    assert distance((moved(small_images[:1]),), behaviour.runs[0].outputs) > 1e-3
    assert behaviour.difference(moved) is None


def test_copies_share_parameters_and_nothing_else(small_vit):
    source = float_copy(small_vit)
    one, other = another_copy(source), another_copy(source)
    assert one.head.weight is other.head.weight is source.head.weight
    assert one.head.weight is not small_vit.head.weight
    one.register_buffer("cache", torch.ones(1))
    assert not hasattr(other, "cache")
    assert not hasattr(source, "cache")


def test_the_second_tracer_gets_a_clean_copy(small_images, monkeypatch):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(16, 5), None

        def forward(self, x):
            if self.scale is None:
                self.scale = x.new_ones(1, x.shape[-1]) * 0.5
            if x.shape[0] > 64:
                x = x * 2
            return self.fc(x.mean((1, 2)) * self.scale)

    copies = []
    original = trace_by_export

    def watched(root, *args, **kwargs):
        copies.append(root.scale)
        return original(root, *args, **kwargs)

    monkeypatch.setattr("ptq4vit_fx.passes.trace.trace_by_export", watched)
    model = Cached().eval()
    with pytest.warns(ptq.PTQWarning, match="on more than 64 images at once"):
        graph = trace(model, (small_images[:1],))
    assert copies == [None] * len(copies)
    torch.testing.assert_close(graph(small_images), model(small_images))


def test_random_numbers_of_the_caller_stay_his(small_vit, small_images):
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_vit

        def forward(self, x):
            return self.inner(x + 0 * torch.rand(1))

    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    ptq.prepare_fx(Drawing().eval(), QUICK, small_images[:1])
    assert torch.equal(torch.rand(3), expected)


def test_the_line_that_says_what_happened():
    error = RuntimeError(
        "\x1b[96mConstraints violated (batch)!\n  - You marked batch as dynamic. \n\nSuggested fixes:\n"
    )
    assert said(error) == "RuntimeError: You marked batch as dynamic."
    assert said(KeyError()) == "KeyError"
    assert len(said(RuntimeError("word " * 200))) < 340
