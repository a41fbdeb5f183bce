"""The integer operators against NumPy integers, and the runtime's float functions against PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, EXACT_FLOAT32, INTEGER_MATMUL, QUANTIZE


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 7, 64, 700, 3000]), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_integer_matmul_is_exact(inner, per_column, extreme, seed):
    random = np.random.default_rng(seed)
    lhs = random.integers(0, 256, (2, 5, inner), np.uint8)
    rhs = random.integers(-128, 128, (inner, 4)).astype(np.int8)
    if extreme:  # sums as large as they get: float32 would round them
        lhs[:], rhs[:] = 255, 127
        lhs[:, :, 0], rhs[0] = 254, 126
    zero_point = 0 if extreme else 128
    lhs_scale = np.float32(0.013)
    rhs_scale = random.uniform(0.001, 0.1, 4 if per_column else ()).astype(np.float32)
    sums = (lhs.astype(np.int64) - zero_point) @ rhs.astype(np.int64)
    expected = sums.astype(np.float32) * (lhs_scale * rhs_scale)
    actual = INTEGER_MATMUL(
        torch.from_numpy(lhs),
        torch.tensor(lhs_scale),
        torch.tensor(zero_point, dtype=torch.uint8),
        torch.from_numpy(rhs),
        torch.as_tensor(rhs_scale),
        torch.zeros(rhs_scale.shape, dtype=torch.int8),
    )
    np.testing.assert_array_equal(actual.numpy(), expected)
    assert not (extreme and inner == 3000) or np.abs(sums).max() > EXACT_FLOAT32


@pytest.mark.parametrize(("dtype", "zero_point"), [(torch.uint8, 128), (torch.uint8, 255), (torch.int8, 0)])
def test_quantize_rounds_half_to_even_and_saturates(dtype, zero_point):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e6, -1e6])
    zero = torch.tensor(zero_point, dtype=dtype)
    codes = QUANTIZE(x, torch.tensor(1.0), zero, 0)
    limits = torch.iinfo(dtype)
    expected = (np.rint(x.numpy()) + zero_point).clip(limits.min, limits.max)
    np.testing.assert_array_equal(codes.numpy(), expected)
    values = DEQUANTIZE(codes, torch.tensor(1.0), zero, 0)
    np.testing.assert_array_equal(values.numpy(), expected - zero_point)
