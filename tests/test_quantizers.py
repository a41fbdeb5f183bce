"""Quantizers against NumPy oracles of the formulas, and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vit_fx import PTQError, TwinUniform, Uniform
from ptq4vit_fx.activations import NEGATIVE_RANGE
from ptq4vit_fx.quantizers import UniformParams, quantizer_from_dict, quantizer_to_dict

BITS = st.integers(2, 8)


def rounding_of_codes(top):
    """Return what float32 adds to half a step, in halves of one, if values of `top` steps are divided and scaled."""
    return 4 * top * np.finfo(np.float32).eps


@settings(deadline=None, max_examples=60)
@given(BITS, st.floats(0.01, 2.0), st.integers(0, 2**31))
def test_uniform_is_the_formula(bits, scale, seed):
    x = np.random.default_rng(seed).normal(0, 3, 500).astype(np.float32)
    s = np.float32(scale)
    expected = s * np.clip(np.rint(x / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    quantizer, params = Uniform(bits), UniformParams(torch.tensor(s))
    actual = quantizer.fake_quantize(torch.from_numpy(x), params)
    np.testing.assert_array_equal(actual.numpy(), expected)
    codes = quantizer.codes(torch.from_numpy(x), params)
    assert torch.equal(quantizer.decode(codes, params), actual)
    assert torch.equal(quantizer.fake_quantize(actual.clone(), params), actual)


@settings(deadline=None, max_examples=60)
@given(BITS, st.floats(0.001, 3.0), st.sampled_from(sorted(set(NEGATIVE_RANGE.values()))), st.integers(0, 2**31))
def test_an_unsigned_grid_spends_no_code_below_the_minimum(bits, scale, minimum, seed):
    x = np.random.default_rng(seed).normal(1, 2, 500).clip(-minimum).astype(np.float32)
    s, top = np.float32(scale), 2**bits - 1
    below = min(np.rint(np.float32(minimum) / s), top)
    expected = s * np.clip(np.rint(x / s), -below, top - below)
    quantizer, params = Uniform(bits, signed=False, minimum=minimum), UniformParams(torch.tensor(s))
    assert int(quantizer.zero_point(params.scale)) == below
    actual = quantizer.fake_quantize(torch.from_numpy(x), params)
    np.testing.assert_array_equal(actual.numpy(), expected)
    codes = quantizer.codes(torch.from_numpy(x), params)
    assert torch.equal(quantizer.decode(codes, params), actual)
    assert int(codes.max() - codes.min()) <= top
    inside = x <= s * (top - below)
    if below < top:  # else the scale is too small to hold the negatives
        assert (np.abs(actual.numpy() - x)[inside] <= s / 2 * (1 + rounding_of_codes(top))).all()


@pytest.mark.parametrize(
    "arguments", [{"minimum": 0.1}, {"minimum": -0.1, "signed": False}, {"minimum": 0.1, "granularity": "head"}]
)
def test_a_minimum_that_a_grid_cannot_have_is_refused(arguments):
    with pytest.raises(PTQError, match="Uniform: minimum: expected 0 or more, and 0 if signed"):
        Uniform(**arguments)


@settings(deadline=None, max_examples=60)
@given(BITS, st.integers(0, 10), st.integers(0, 2**31))
def test_softmax_twin_is_the_formula(bits, shift, seed):
    x = np.random.default_rng(seed).beta(0.2, 4, 500).astype(np.float32)
    half = 2 ** (bits - 1)
    coarse = np.float32(1 / half)
    fine = np.float32(coarse / 2**shift)
    low = fine * np.clip(np.rint(x / fine), 0, half - 1)
    high = coarse * np.clip(np.rint(x / coarse), 0, half - 1)
    twin = TwinUniform(bits, "softmax")
    params = twin.softmax_params(torch.tensor(shift))
    actual = twin.fake_quantize(torch.from_numpy(x), params)
    np.testing.assert_array_equal(actual.numpy(), np.where(x < half * fine, low, high))
    codes = twin.codes(torch.from_numpy(x), params)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**bits
    assert torch.equal(codes >= half, torch.from_numpy(x >= half * fine))
    assert torch.equal(twin.decode(codes, params), actual)


@settings(deadline=None, max_examples=60)
@given(BITS, st.floats(0.001, 1.0), st.integers(0, 2**31))
def test_gelu_twin_covers_the_negatives_and_decodes_bit_for_bit(bits, scale, seed):
    x = torch.nn.functional.gelu(torch.from_numpy(np.random.default_rng(seed).normal(0, 2, 500).astype(np.float32)))
    twin = TwinUniform(bits, "gelu")
    params = twin.gelu_params(torch.tensor(scale))
    half = 2 ** (bits - 1)
    assert float(params.fine_scale) * half >= NEGATIVE_RANGE["gelu"] * (1 - 1e-6)
    assert float(params.fine_scale) * 2**params.shift == pytest.approx(float(params.coarse_scale), rel=0)
    actual = twin.fake_quantize(x.clone(), params)
    codes = twin.codes(x, params)
    assert torch.equal(twin.decode(codes, params), actual)
    negative = x < 0
    error = (actual[negative] - x[negative]).abs().max()
    assert error <= params.fine_scale / 2 * (1 + rounding_of_codes(half))


@settings(deadline=None, max_examples=60)
@given(BITS, st.integers(0, 10), st.integers(0, 2**31))
def test_wide_softmax_twin_is_the_formula_and_has_half_the_steps(bits, shift, seed):
    x = np.random.default_rng(seed).beta(0.2, 4, 500).astype(np.float32)
    top = 2**bits - 1
    coarse = np.float32(1 / top)
    fine = np.float32(coarse / 2**shift)
    threshold = fine * np.float32(top)
    low = np.clip(np.rint(x / fine), 0, top)
    high = np.clip(np.rint((x - threshold) / coarse), 0, top)
    twin = TwinUniform(bits, "softmax", wide=True)
    params = twin.softmax_params(torch.tensor(shift))
    assert float(twin.threshold(params)) == threshold == pytest.approx(2.0**-shift)
    actual = twin.fake_quantize(torch.from_numpy(x), params)
    np.testing.assert_array_equal(actual.numpy(), fine * low + coarse * high)
    codes = twin.codes(torch.from_numpy(x), params)
    np.testing.assert_array_equal(codes.numpy(), low + high)
    assert torch.equal(twin.decode(codes, params), actual)
    error = np.abs(actual.numpy() - x)
    assert (error <= np.where(x <= threshold, fine, coarse) / 2 * (1 + rounding_of_codes(top))).all()


@settings(deadline=None, max_examples=60)
@given(BITS, st.floats(0.001, 1.0), st.integers(0, 2**31))
def test_wide_gelu_twin_is_the_formula_and_covers_the_negatives(bits, scale, seed):
    x = torch.nn.functional.gelu(torch.from_numpy(np.random.default_rng(seed).normal(0, 2, 500).astype(np.float32)))
    twin, top = TwinUniform(bits, "gelu", wide=True), 2**bits - 1
    params = twin.gelu_params(torch.tensor(scale))
    fine, coarse = params.fine_scale.numpy(), params.coarse_scale.numpy()
    assert fine * top >= NEGATIVE_RANGE["gelu"] * (1 - 1e-6)
    assert fine * 2**params.shift == pytest.approx(coarse, rel=0)
    values = x.numpy()
    expected = fine * np.clip(np.rint(values / fine), -top, 0) + coarse * np.clip(np.rint(values / coarse), 0, top)
    actual = twin.fake_quantize(x.clone(), params)
    np.testing.assert_array_equal(actual.numpy(), expected)
    assert torch.equal(twin.decode(twin.codes(x, params), params), actual)
    negative = x < 0
    error = (actual[negative] - x[negative]).abs().max()
    assert error <= params.fine_scale / 2 * (1 + rounding_of_codes(top))


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(PTQError, match="expected an integer from 2 to 8"):
        Uniform(bits)


def test_quantizers_are_read_back_and_those_of_another_version_refused():
    record = quantizer_to_dict(Uniform(6, signed=False, minimum=0.17))
    assert quantizer_from_dict(record) == Uniform(6, signed=False, minimum=0.17)
    del record["minimum"]  # as plans were written before grids had one
    assert quantizer_from_dict(record) == Uniform(6, signed=False)
    with pytest.raises(PTQError, match="Uniform: expected fields that this version knows, got offset"):
        quantizer_from_dict(record | {"offset": 1})
    with pytest.raises(PTQError, match="kind: expected Uniform or TwinUniform or Unquantized, got 'Log'"):
        quantizer_from_dict({"kind": "Log"})


def parameters():
    """Return a quantizer of each kind with parameters, and values for it."""
    x = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    twin = TwinUniform(6, "softmax")
    return [
        (Uniform(6), UniformParams(torch.tensor(0.02)), x),
        (Uniform(6, granularity="head"), UniformParams(torch.tensor([0.02, 0.3, 0.1]), axis=-2), x),
        (twin, twin.softmax_params(torch.tensor(3)), x),
    ]


@pytest.mark.parametrize(("quantizer", "params", "x"), parameters(), ids=["uniform", "per head", "twin"])
def test_parameters_are_their_tensors_and_their_axis(quantizer, params, x):
    built = quantizer.params_from(params.to(torch.device("cpu")).tensors(), params.axis)
    assert type(built) is type(params)
    assert built.axis == params.axis
    codes = quantizer.codes(x, params)
    assert torch.equal(quantizer.codes(x, built), codes)
    assert torch.equal(quantizer.decode(codes, built), quantizer.fake_quantize(x.clone(), params))
    assert quantizer_from_dict(quantizer_to_dict(quantizer)) == quantizer


def test_scales_along_an_axis_are_broadcast():
    _, (quantizer, params, x), _ = parameters()
    for head, scale in enumerate(params.scale):
        alone = quantizer.fake_quantize(x[:, head].clone(), UniformParams(scale))
        assert torch.equal(quantizer.fake_quantize(x.clone(), params)[:, head], alone)


def test_parameters_of_another_kind_are_refused():
    (uniform, scale, x), _, (twin, scales, _) = parameters()
    for method in ("codes", "decode", "fake_quantize"):
        with pytest.raises(PTQError, match="Uniform: parameters: expected UniformParams, got TwinParams; calibrate"):
            getattr(uniform, method)(x, scales)
        with pytest.raises(PTQError, match="TwinUniform: parameters: expected TwinParams, got UniformParams"):
            getattr(twin, method)(x, scale)
    with pytest.raises(PTQError, match="Uniform: parameters: expected scale, got fine_scale and coarse_scale"):
        uniform.params_from(scales.tensors())
    with pytest.raises(PTQError, match="TwinUniform: parameters: expected fine_scale and coarse_scale, got none"):
        twin.params_from({})
