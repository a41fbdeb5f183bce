"""The search against brute force in NumPy float64 over the same candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ptq4vit_fx import SearchSettings, TwinUniform, Uniform
from ptq4vit_fx.activations import NEGATIVE_RANGE
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.search.landscape import Choice
from ptq4vit_fx.search.products import to_product
from ptq4vit_fx.search.search_op import alternate, search_op

BITS = 4
SETTINGS = SearchSettings(n=24, rounds=1, max_shift=6, screen_rows=None)


def uniform(x, scale):
    return scale * np.clip(np.rint(x / scale), -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)


def softmax_twin(x, shift):
    half = 2 ** (BITS - 1)
    coarse, fine = 1 / half, 1 / half / 2**shift
    low, high = (s * np.clip(np.rint(x / s), 0, half - 1) for s in (fine, coarse))
    return np.where(x < 2.0**-shift, low, high)


def operands(seed, *, softmax):
    random = np.random.default_rng(seed)
    x = random.normal(0, 1, (2, 3, 6, 10))
    if softmax:
        x = np.exp(3 * x) / np.exp(3 * x).sum(-1, keepdims=True)
    gradient = random.normal(0, 1, (2, 3, 6, 5)) * random.exponential(1, (2, 3, 6, 1))
    return x.astype(np.float32), random.normal(0, 0.3, (2, 3, 10, 5)).astype(np.float32), gradient.astype(np.float32)


def brute_force(candidates, quantize, product, gradient, target):
    """Return the candidate with the smallest Hessian-guided distance."""
    distances = [float((gradient**2 * (product(quantize(c)) - target) ** 2).sum()) for c in candidates]
    return candidates[int(np.argmin(distances))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("softmax", [False, True])
def test_matmul_search_is_brute_force(seed, softmax):
    lhs, rhs, gradient = operands(seed, softmax=softmax)
    op = QuantOp("matmul", "matmul", lhs_source="softmax" if softmax else None)
    product = to_product(op, torch.from_numpy(lhs), torch.from_numpy(rhs), None, torch.from_numpy(gradient**2))
    quantizer = TwinUniform(BITS, "softmax") if softmax else Uniform(BITS)
    result: Any = search_op(op, product, quantizer, Uniform(BITS), SETTINGS)

    x, y, g = (t.astype(np.float64) for t in (lhs, rhs, gradient))
    target = x @ y
    start = np.abs(y).max() / 2 ** (BITS - 1)
    initial = softmax_twin(x, 0) if softmax else uniform(x, np.abs(x).max() / 2 ** (BITS - 1))
    scales = [np.float64(factor) * start for factor in SETTINGS.factors]
    right = brute_force(scales, lambda s: uniform(y, s), lambda q: initial @ q, g, target)
    assert float(result.rhs.scale) == pytest.approx(right, rel=1e-6)
    fixed = uniform(y, right)
    if softmax:
        left = brute_force(list(range(7)), lambda m: softmax_twin(x, m), lambda q: q @ fixed, g, target)
        assert result.lhs.shift == left
    else:
        scales = [np.float64(factor) * np.abs(x).max() / 2 ** (BITS - 1) for factor in SETTINGS.factors]
        left = brute_force(scales, lambda s: uniform(x, s), lambda q: q @ fixed, g, target)
        assert float(result.lhs.scale) == pytest.approx(left, rel=1e-6)
    assert result.distance_after <= result.distance_before


@pytest.mark.parametrize("seed", range(3))
def test_separate_scales_for_the_rows_of_q_k_and_v(seed):
    random = np.random.default_rng(seed)
    x = random.normal(0, 1, (40, 6)).astype(np.float32)
    weight = (random.normal(0, 1, (12, 6)) * np.repeat([1.0, 0.1, 3.0], 4)[:, None]).astype(np.float32)
    gradient = random.normal(0, 1, (40, 12)).astype(np.float32)
    op = QuantOp("qkv", "linear", rhs_is_weight=True)
    product = to_product(op, torch.from_numpy(x), torch.from_numpy(weight), None, torch.from_numpy(gradient**2))
    result: Any = search_op(op, product, Uniform(BITS), Uniform(BITS, granularity="group", groups=3), SETTINGS)
    initial = uniform(x.astype(np.float64), np.abs(x).max() / 2 ** (BITS - 1))
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        part, g = weight[rows].astype(np.float64), gradient[:, rows].astype(np.float64)
        scales = [np.float64(f) * np.abs(part).max() / 2 ** (BITS - 1) for f in SETTINGS.factors]
        target = x.astype(np.float64) @ part.T
        best = brute_force(scales, lambda s, w=part: uniform(w, s), lambda q: initial @ q.T, g, target)
        np.testing.assert_allclose(result.rhs.scale[rows].numpy(), best, rtol=1e-6)


def gelu_twin(x, coarse):
    """Two ranges: steps `coarse` for positives, and the finest coarse / 2^m that covers -0.16997 for negatives."""
    half = 2 ** (BITS - 1)
    coarse = max(coarse, NEGATIVE_RANGE["gelu"] / half)
    fine = coarse / 2 ** max(m for m in range(20) if half * coarse / 2**m >= NEGATIVE_RANGE["gelu"] * (1 - 1e-9))
    return coarse * np.clip(np.rint(x / coarse), 0, half - 1) + fine * np.clip(np.rint(x / fine), -half, 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_search_is_brute_force(seed, gelu):
    random = np.random.default_rng(seed)
    x: np.ndarray = random.normal(0, 1.5, (50, 8)).astype(np.float32)
    if gelu:
        x = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    weight, bias = random.normal(0, 0.3, (6, 8)).astype(np.float32), random.normal(0, 1, 6).astype(np.float32)
    gradient = (random.normal(0, 1, (50, 6)) * random.exponential(1, (50, 1))).astype(np.float32)
    op = QuantOp("fc", "linear", lhs_source="gelu" if gelu else None, rhs_is_weight=True)
    product = to_product(op, *(torch.from_numpy(t) for t in (x, weight, bias, gradient**2)))
    quantizer = TwinUniform(BITS, "gelu") if gelu else Uniform(BITS)
    result: Any = search_op(op, product, quantizer, Uniform(BITS), SETTINGS)

    x, w, g = (t.astype(np.float64) for t in (x, weight, gradient))
    target, half = x @ w.T, 2 ** (BITS - 1)
    quantize = gelu_twin if gelu else uniform
    start = (x.max() if gelu else np.abs(x).max()) / half
    initial = quantize(x, start)
    scales = [np.float64(factor) * np.abs(w).max() / half for factor in SETTINGS.factors]
    right = brute_force(scales, lambda s: uniform(w, s), lambda q: initial @ q.T, g, target)
    assert float(result.rhs.scale) == pytest.approx(right, rel=1e-6)
    scales = [np.float64(factor) * start for factor in SETTINGS.factors]
    left = brute_force(scales, lambda s: quantize(x, s), lambda q: q @ uniform(w, right).T, g, target)
    chosen = result.lhs.coarse_scale if gelu else result.lhs.scale
    assert float(chosen) == pytest.approx(max(left, NEGATIVE_RANGE["gelu"] / half) if gelu else left, rel=1e-6)
    if gelu:
        fine = float(result.lhs.fine_scale)
        assert half * fine >= NEGATIVE_RANGE["gelu"] * (1 - 1e-6)
        assert float(chosen) / fine == pytest.approx(2**result.lhs.shift, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_convolution_search_is_brute_force(seed, granularity):
    random = np.random.default_rng(seed)
    image = random.normal(0, 1, (3, 2, 7, 6)).astype(np.float32)
    kernel = (random.normal(0, 1, (4, 2, 3, 2)) * np.array([1, 0.2, 3, 1])[:, None, None, None]).astype(np.float32)
    gradient = random.normal(0, 1, (3, 4, 4, 3)).astype(np.float32)
    op = QuantOp("conv", "conv2d", rhs_is_weight=True, stride=(2, 2), padding=(1, 0))
    product = to_product(op, torch.from_numpy(image), torch.from_numpy(kernel), None, torch.from_numpy(gradient**2))
    result: Any = search_op(op, product, Uniform(BITS), Uniform(BITS, granularity=granularity), SETTINGS)

    def convolve(x, k):
        x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (0, 0)))
        out = np.zeros((3, len(k), 4, 3))
        for i, j in np.ndindex(4, 3):
            out[:, :, i, j] = np.einsum("bcij,ocij->bo", x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 2], k)
        return out

    half = 2 ** (BITS - 1)
    initial = uniform(image.astype(np.float64), np.abs(image).max() / half)
    weight, chosen = kernel.astype(np.float64), np.empty_like(kernel, np.float64)
    if granularity == "channel":  # every channel has the mean weight of its position
        gradient = np.broadcast_to(np.sqrt((gradient**2).mean(1, keepdims=True)), gradient.shape)
    scales = np.broadcast_to(result.rhs.scale.numpy(), 4)
    groups = [[0], [1], [2], [3]] if granularity == "channel" else [[0, 1, 2, 3]]
    for rows in groups:
        part, g = weight[rows], gradient[:, rows].astype(np.float64)
        tried = [np.float64(factor) * np.abs(part).max() / half for factor in SETTINGS.factors]
        best = brute_force(
            tried, lambda s, p=part: uniform(p, s), lambda q: convolve(initial, q), g, convolve(image, part)
        )
        np.testing.assert_allclose(scales[rows], best, rtol=1e-6)
        chosen[rows] = uniform(part, best)
    tried = [np.float64(factor) * np.abs(image).max() / half for factor in SETTINGS.factors]
    target = convolve(image, weight)
    g = gradient.astype(np.float64)
    left = brute_force(tried, lambda s: uniform(image, s), lambda q: convolve(q, chosen), g, target)
    assert float(result.lhs.scale) == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_default_screening_ends_near_the_exhaustive_search(seed):
    random = np.random.default_rng(seed)
    x = random.standard_t(4, (3000, 32)).astype(np.float32)
    weight = random.normal(0, 0.3, (24, 32)).astype(np.float32)
    gradient = (random.normal(0, 1, (3000, 24)) * random.exponential(1, (3000, 1))).astype(np.float32)
    op = QuantOp("fc", "linear", rhs_is_weight=True)
    product = to_product(op, torch.from_numpy(x), torch.from_numpy(weight), None, torch.from_numpy(gradient**2))
    screened = search_op(op, product, Uniform(BITS), Uniform(BITS), SearchSettings(), seed=seed)
    exhaustive = search_op(op, product, Uniform(BITS), Uniform(BITS), SearchSettings(screen_rows=None))
    assert screened.distance_after <= exhaustive.distance_after * 1.02


def test_rhs_and_lhs_alternate_from_the_start_that_is_given():
    asked = []

    class Counting:
        """The best candidate of an operand is the number of the question."""

        def best(self, operand, choice):
            asked.append((operand, int(choice["lhs"]), int(choice["rhs"])))
            return torch.tensor(len(asked))

        def decide(self, choice):
            raise AssertionError("the alternation decides nothing")

        def anew(self):
            raise AssertionError("one start is one strategy")

    start: Choice = {"lhs": torch.tensor(70), "rhs": torch.tensor(80)}
    end = alternate(Counting(), start, 2)
    assert asked == [("rhs", 70, 80), ("lhs", 70, 1), ("rhs", 2, 1), ("lhs", 2, 3)]
    assert {operand: int(index) for operand, index in end.items()} == {"lhs": 4, "rhs": 3}
    assert int(start["lhs"]) == 70


def nearly_even_attention(tokens=257, images=2, heads=3):
    """Return softmax rows of values around 1 / tokens, below half a step of the coarse grid, and a v with means."""
    generator = torch.Generator().manual_seed(0)
    lhs = torch.randn(images, heads, tokens, tokens, generator=generator).mul(0.3).softmax(-1)
    rhs = torch.randn(images, heads, tokens, 16, generator=generator)
    return lhs, rhs + torch.randn(1, heads, 1, 16, generator=generator)


@pytest.mark.parametrize("screen_rows", [512, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_softmax_without_large_values_is_not_given_up(bits, screen_rows):
    lhs, rhs = nearly_even_attention()
    op = QuantOp("matmul", "matmul", lhs_source="softmax")
    quantizers = TwinUniform(bits, "softmax"), Uniform(bits, granularity="head")
    result: Any = search_op(op, to_product(op, lhs, rhs), *quantizers, SearchSettings("mse", screen_rows=screen_rows))
    own = [
        float((quantizers[0].fake_quantize(lhs, quantizers[0].softmax_params(torch.tensor(shift))) - lhs).norm())
        for shift in range(11)
    ]
    assert result.lhs.shift == int(np.argmin(own))
    assert min(result.snr.values()) > {4: 10, 8: 30}[bits]


def test_where_the_product_says_nothing_an_operand_keeps_its_values():
    """v is zero in one head and no gradient reaches the rows of the softmax there: any scale has the same distance."""
    lhs, rhs = nearly_even_attention(tokens=40)
    lhs = lhs * 8
    rhs[:, 1] = 0
    op = QuantOp("matmul", "matmul")
    product = to_product(op, lhs, rhs)
    settings = SearchSettings("mse", screen_rows=None)
    quantizer = Uniform(8, granularity="head")
    result: Any = search_op(op, product, quantizer, quantizer, settings)
    noise = (quantizer.fake_quantize(lhs, result.lhs) - lhs).square().sum((0, 2, 3))
    assert (10 * torch.log10(lhs.square().sum((0, 2, 3)) / noise) > 35).all()


@pytest.mark.parametrize("seed", range(6))
def test_no_operand_could_have_a_tenth_of_its_error_at_an_equal_distance(seed):
    generator = torch.Generator().manual_seed(seed)
    lhs, rhs = torch.randn(2, 2, 12, 10, generator=generator), torch.randn(2, 2, 10, 6, generator=generator)
    weight = torch.rand(2, 2, 12, 6, generator=generator)
    weight[:, seed % 2] *= 0.0  # a head that no gradient reaches
    op = QuantOp("matmul", "matmul")
    product = to_product(op, lhs, rhs, None, weight)
    settings = SearchSettings(n=40, screen_rows=None)
    quantizer = Uniform(4, granularity="head")
    result: Any = search_op(op, product, quantizer, quantizer, settings)
    fixed = {"lhs": quantizer.fake_quantize(lhs, result.lhs), "rhs": quantizer.fake_quantize(rhs, result.rhs)}
    largest = {"lhs": lhs.abs().amax((0, 2, 3)) / 8, "rhs": rhs.abs().amax((0, 2, 3)) / 8}
    for operand, x, other in (("lhs", lhs, fixed["rhs"]), ("rhs", rhs, fixed["lhs"])):

        def judge(quantized, x=x, other=other, operand=operand):
            out = quantized @ other if operand == "lhs" else other @ quantized
            return (weight * (out - lhs @ rhs) ** 2).sum((0, 2, 3)), (quantized - x).square().sum((0, 2, 3))

        distance, own = judge(fixed[operand])
        for factor in settings.factors:
            scale = (factor * largest[operand]).view(-1, 1, 1)
            tried_distance, tried_own = judge(scale * (x / scale).round().clamp(-8, 7))
            assert not ((tried_distance <= distance) & (tried_own < 0.1 * own)).any()
