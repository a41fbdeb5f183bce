"""Screening against the exhaustive search: closed forms, samples of heavy rows, promising candidates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vit_fx import SearchSettings, TwinUniform, Uniform
from ptq4vit_fx.names import OPERANDS, Operand
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.quantizers import Quantizer
from ptq4vit_fx.search.candidates import Candidates, make_candidates, uniform_choice
from ptq4vit_fx.search.distances import (
    ActivationEvaluation,
    OutputEvaluation,
    RoundingEvaluation,
    WeightEvaluation,
    make_evaluation,
)
from ptq4vit_fx.search.landscape import Choice, Landscape
from ptq4vit_fx.search.metrics import HESSIAN, L1, get_metric
from ptq4vit_fx.search.products import to_product
from ptq4vit_fx.search.sampling import _draw, sample_rows
from ptq4vit_fx.search.screening import screen
from ptq4vit_fx.search.search_op import search_op

LINEAR = QuantOp("fc", "linear", rhs_is_weight=True)


def linear(seed, rows=3000, inner=24, columns=40, *, heavy=False, gelu=False):
    """Return a linear product with one weight per row; heavy: 1 % of the rows hold nearly all of it."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=random) * torch.rand(rows, 1, generator=random).add(0.2)
    x = torch.nn.functional.gelu(x) if gelu else x
    weight, bias = torch.randn(columns, inner, generator=random), torch.randn(columns, generator=random)
    importance = torch.rand(rows, 1, generator=random)
    if heavy:
        importance[torch.randperm(rows, generator=random)[: rows // 100]] *= 1000
    return to_product(LINEAR, x, weight, bias, importance)


def attention(seed, images=24, tokens=65):
    """Return q @ k of two heads whose gradient lies on one token of each image."""
    random = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(images, 2, *size, generator=random) for size in ((tokens, 16), (16, tokens)))
    importance = torch.rand(images, 2, tokens, tokens, generator=random) ** 4
    importance[:, :, 0] *= 500
    return to_product(QuantOp("qk", "matmul"), q, k, None, importance)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("twin", [False, True])
def test_closed_forms_are_the_distance_of_the_outputs(granularity, twin):
    product = linear(0)
    quantizers: dict[Operand, Quantizer] = {
        "lhs": TwinUniform(4, "gelu") if twin else Uniform(4),
        "rhs": Uniform(4, granularity=granularity),
    }
    candidates = {o: make_candidates(quantizers[o], LINEAR, product, o, SearchSettings()) for o in OPERANDS}
    choice: Choice = {"lhs": uniform_choice(candidates["lhs"], 60), "rhs": uniform_choice(candidates["rhs"], 70)}
    landscape = Landscape(product, HESSIAN, candidates)
    assert sum(part.lhs.shape[2] for part, _ in landscape.parts) == 3000
    kinds: dict[Operand, type] = {"rhs": WeightEvaluation, "lhs": ActivationEvaluation}
    for operand, kind in kinds.items():
        closed = make_evaluation(landscape, operand, choice)
        assert type(closed) is kind
        direct = OutputEvaluation(landscape, operand, choice)
        groups = candidates[operand].groups
        for number in (5, 40, 99):
            indices = torch.full((groups.heads, groups.columns), number)
            torch.testing.assert_close(closed(indices[None]), direct(indices[None]), rtol=2e-4, atol=0)
    assert type(make_evaluation(replace(landscape, metric=L1), "rhs", choice)) is OutputEvaluation


@pytest.mark.parametrize("metric", ["hessian", "cosine", "pearson"])
@pytest.mark.parametrize("operand", ["lhs", "rhs"])
@pytest.mark.parametrize("case", ["q @ k", "softmax @ v", "linear"])
def test_stacked_choices_are_evaluated_like_single_ones(case, operand, metric):
    quantizers: dict[Operand, Quantizer]
    if case == "linear":
        product, op = linear(2, rows=60), LINEAR
        quantizers = {"lhs": Uniform(6), "rhs": Uniform(6, granularity="channel")}
    else:
        product, op = attention(2, images=3, tokens=9), QuantOp("qk", "matmul")
        quantizers = {"lhs": Uniform(6, granularity="head"), "rhs": Uniform(6, granularity="head")}
        if case == "softmax @ v":
            product, quantizers["lhs"] = replace(product, lhs=product.lhs.softmax(-1)), TwinUniform(6, "softmax")
    candidates = {o: make_candidates(quantizers[o], op, product, o, SearchSettings()) for o in OPERANDS}
    choice = {key: uniform_choice(value, min(60, value.count - 1)) for key, value in candidates.items()}
    evaluation = OutputEvaluation(Landscape(product, get_metric(metric), candidates), operand, choice)
    searched = candidates[operand]
    shape = (7, searched.groups.heads, searched.groups.columns)
    indices = torch.randint(searched.count, shape, generator=torch.Generator().manual_seed(0))
    assert evaluation.at_once > 1
    evaluation.at_once = 3
    stacked = evaluation(indices)
    evaluation.at_once = 1
    # 1 - cosine is a small difference of sums in float32
    torch.testing.assert_close(stacked, evaluation(indices), rtol=1e-5, atol=0 if metric == "hessian" else 1e-6)
    quantized = searched.fake_quantize(product.lhs if operand == "lhs" else product.rhs, indices[4])
    other = candidates["rhs" if operand == "lhs" else "lhs"]
    fixed = other.fake_quantize(
        product.rhs if operand == "lhs" else product.lhs, choice["rhs" if operand == "lhs" else "lhs"]
    )
    out = product.output(*((quantized, fixed) if operand == "lhs" else (fixed, quantized)))
    target = product.output(product.lhs, product.rhs)
    if metric == "hessian":
        per_scale = ((out - target).square() * product.element_weight).sum((0, 2)).double()
        torch.testing.assert_close(stacked[4], searched.groups.reduce(per_scale), rtol=1e-5, atol=0)


@pytest.mark.parametrize("screen_rows", [None, 128])
@pytest.mark.parametrize("make", [linear, attention])
def test_chunks_change_nothing(monkeypatch, make, screen_rows):
    """Images of a large attention are evaluated one by one: each has a right operand of its own."""
    op = LINEAR if make is linear else QuantOp("qk", "matmul")
    quantizers = (Uniform(6), Uniform(6, granularity="channel" if make is linear else "head"))
    settings = SearchSettings(n=20, screen_rows=screen_rows)
    whole: Any = search_op(op, make(3), *quantizers, settings)
    monkeypatch.setattr("ptq4vit_fx.search.products.CPU_ELEMENTS", 1)
    chunked: Any = search_op(op, make(3), *quantizers, settings)
    assert chunked.distance_after == pytest.approx(whole.distance_after, rel=1e-5)
    assert torch.equal(chunked.rhs.scale, whole.rhs.scale)


@pytest.mark.parametrize("is_rounded", [False, True])
def test_narrowed_evaluation_is_that_of_its_columns(monkeypatch, is_rounded):
    monkeypatch.setattr("ptq4vit_fx.search.landscape.LONG_COLUMN", 1)
    product = linear(1)
    candidates: dict[Operand, Candidates] = {
        "lhs": make_candidates(Uniform(6), LINEAR, product, "lhs", SearchSettings()),
        "rhs": make_candidates(Uniform(6, granularity="channel"), LINEAR, product, "rhs", SearchSettings()),
    }
    choice = {key: uniform_choice(value, 80) for key, value in candidates.items()}
    whole = make_evaluation(Landscape(product, HESSIAN, candidates, is_rounded), "rhs", choice)
    assert type(whole) is (RoundingEvaluation if is_rounded else WeightEvaluation)
    columns = torch.tensor([3, 4, 17, 39])
    indices = torch.randint(100, (3, 1, 40), generator=torch.Generator().manual_seed(0))
    part = whole.narrow(columns)
    assert part is not None
    torch.testing.assert_close(part(indices[..., columns]), whole(indices)[..., columns], rtol=1e-5, atol=0)
    nested = part.narrow(torch.tensor([1, 3]))
    assert nested is not None
    torch.testing.assert_close(nested(indices[..., columns[[1, 3]]]), whole(indices)[..., [4, 39]], rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 30), power=st.floats(0.0, 12.0))
def test_draws_are_different_columns_and_the_heavy_ones_are_in(seed, count, power):
    mass = torch.rand(3, 64, generator=torch.Generator().manual_seed(seed)).double() ** power
    chosen, factor = _draw(mass, count, torch.Generator().manual_seed(seed))
    assert all(len(set(line.tolist())) == count for line in chosen)
    assert (factor >= 1).all()
    certain = 0.9 * mass / mass.sum(1, keepdim=True) * count >= 1
    for line, sure in zip(chosen, certain, strict=True):
        assert set(sure.nonzero().flatten().tolist()) <= set(line.tolist())


def test_sampled_sums_are_unbiased():
    mass = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)).double() ** 6
    values = torch.rand(50, generator=torch.Generator().manual_seed(1))
    sums = []
    for seed in range(2000):
        chosen, factor = _draw(mass, 8, torch.Generator().manual_seed(seed))
        sums.append(float((values[chosen[0]] * factor[0]).sum()))
    error = np.std(sums) / len(sums) ** 0.5
    assert abs(np.mean(sums) - float(values.sum())) < 4 * error


def test_a_small_product_is_its_own_sample():
    product = linear(0, rows=100)
    assert sample_rows(product, torch.ones(1, 1, 100), 128, torch.Generator()) is product


def test_many_windows_are_sampled_by_few_that_stand_for_all():
    product = attention(0, images=400, tokens=16)
    mass = torch.ones(400, 2, 16)
    sums = []
    for seed in range(200):
        sample = sample_rows(product, mass, 128, torch.Generator().manual_seed(seed))
        assert sample.lhs.shape[:3] == (32, 2, 4)
        assert sample.rhs.shape[0] == 32
        sums.append(float(sample.element_weight.sum()))
    total = float(product.element_weight.sum())
    assert abs(np.mean(sums) / total - 1) < 4 * np.std(sums) / total / len(sums) ** 0.5
    assert sample_rows(product, mass, 1024, torch.Generator()).lhs.shape[0] == 256


@pytest.mark.parametrize("seed", range(20))
def test_screening_finds_the_minimum_of_a_rough_landscape(seed):
    random = np.random.default_rng(seed)
    position = np.arange(100)[:, None] / 100
    smooth = 1 + 8 * (position - random.uniform(0.5, 0.9, 6)) ** 2
    landscape = torch.from_numpy(smooth * random.uniform(0.9, 1.1, (100, 6)))[:, None]

    class Rough:
        class searched:  # noqa: N801
            ordered, count = True, 100

            class groups:  # noqa: N801
                heads, columns = 1, 6

        at_once = 1

        def __call__(self, indices):
            return landscape.gather(0, indices)

        def narrow(self, columns):
            return None

    table, expected = screen(Rough(), None)  # type: ignore[arg-type]
    known = table.isfinite()
    assert torch.equal(expected[known], table[known])
    assert expected.isfinite().all()
    assert table.amin(0).div(landscape.amin(0)).max() < 1.03
    assert known.double().mean() < 0.95


CASES: dict[str, Any] = {
    "linear, channel": (linear, Uniform(8), Uniform(8, granularity="channel"), {}),
    "linear, tensor": (linear, Uniform(8), Uniform(8), {}),
    "heavy rows": (linear, Uniform(8), Uniform(8, granularity="channel"), {"heavy": True}),
    "post-GELU": (
        linear,
        TwinUniform(8, "gelu"),
        Uniform(8, granularity="channel"),
        {"inner": 48, "columns": 12, "gelu": True},
    ),
    "attention": (attention, Uniform(8, granularity="head"), Uniform(8, granularity="head"), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(6))
def test_screened_search_ends_within_one_percent_of_the_exhaustive_one(case, seed):
    make, lhs, rhs, arguments = CASES[case]
    product = make(seed, **arguments)
    op = LINEAR if product.rhs.shape[0] == 1 else QuantOp("qk", "matmul")
    screened = search_op(op, product, lhs, rhs, SearchSettings(), seed=seed)
    exhaustive = search_op(op, product, lhs, rhs, SearchSettings(screen_rows=None))
    assert screened.distance_after <= exhaustive.distance_after * 1.01
