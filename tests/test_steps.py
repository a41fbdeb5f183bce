"""Pipelines are values: printed, cut, continued, timed; and a convolution has one spelling whatever the model's was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import calibrated, model_of, two_blocks
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.contract import history
from ptq4vit_fx.passes.graph.operators import INTEGER_MATMUL
from ptq4vit_fx.pipeline import CONVERSION, preparation, timings

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def names(pipeline):
    return [step.name for step in pipeline.steps]


def test_a_pipeline_prints_every_step_with_its_reason():
    lines = str(CONVERSION).splitlines()
    assert lines[0] == "convert:"
    assert [line.split()[0] for line in lines[1:]] == names(CONVERSION)
    assert all(step.reason and step.reason in line for step, line in zip(CONVERSION.steps, lines[1:], strict=True))


def test_a_pipeline_is_cut_and_goes_on():
    prepared = calibrated(two_blocks(), X)
    whole = CONVERSION.run(copy.deepcopy(prepared))
    half = CONVERSION.until("fold_weights").run(copy.deepcopy(prepared))
    assert [rewrite.name for rewrite in history(half)][-1] == "fold_weights"
    CONVERSION.after("fold_weights").run(half)
    assert history(half) == history(whole)
    assert torch.equal(half(X), whole(X))
    assert names(CONVERSION.without("narrow_tokens")) == [n for n in names(CONVERSION) if n != "narrow_tokens"]


def test_an_unknown_step_is_an_error_with_near_names():
    with pytest.raises(
        ptq.PTQError, match=r"pipeline convert: 'fold_weight': expected a step, .*near names: fold_weights"
    ):
        CONVERSION.until("fold_weight")


def test_every_pass_is_timed():
    converted = ptq.convert_fx(calibrated(two_blocks(), X))
    rows = timings(converted).splitlines()
    expected = ["trace", *names(preparation(ptq.recipes.ptq4vit())), *names(CONVERSION)]
    assert [row.split()[0] for row in rows[1:]] == expected
    assert all(rewrite.seconds > 0 for rewrite in history(converted)[1:])


CONVOLUTIONS = {
    "keyword": lambda x, w: F.conv2d(x, w, stride=4),
    "positional": lambda x, w: F.conv2d(x, w, None, 4),
    "all keywords": lambda x, w: F.conv2d(input=x, weight=w, stride=(4, 4)),
    "torch": lambda x, w: torch.conv2d(x, w, stride=[4, 4]),
    "list": lambda x, w: F.conv2d(x, w, None, [4], [0]),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_is_lowered_however_it_is_spelled(case):
    patches, head = nn.Conv2d(3, 8, 4, bias=False), nn.Linear(8, 5)
    model = model_of(lambda m, x: m.h(CONVOLUTIONS[case](x, m.p.weight).flatten(2).mean(-1)), p=patches, h=head)
    converted = ptq.convert_fx(calibrated(model, X))
    assert sum(node.target is INTEGER_MATMUL for node in converted.graph.nodes) == 2
    assert converted.plan.op("p").stride == (4, 4)
    assert (converted(X) - model(X)).norm() / model(X).norm() < 0.05


PRODUCTS = {
    "bmm by name": lambda x: torch.bmm(x[:, 0], mat2=x[:, 1]),
    "mm": lambda x: torch.mm(x[0, 0], x[0, 1]),
    "mm method": lambda x: x[0, 0].mm(x[0, 1]),
    "matmul by name": lambda x: torch.matmul(x, other=x),
    "linear by name": lambda x: F.linear(x, weight=x[0, 0]),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_are_bound_by_signature(case):
    from ptq4vit_fx.passes.canonicalize import canonicalize
    from ptq4vit_fx.passes.graph.marks import kind_of
    from ptq4vit_fx.passes.trace import trace

    model = model_of(lambda m, x: PRODUCTS[case](x))
    graph = canonicalize(trace(model))
    assert [kind_of(node) for node in graph.graph.nodes if kind_of(node)] == [
        "linear" if case == "linear by name" else "matmul"
    ]
    assert torch.equal(graph(X), model(X))
