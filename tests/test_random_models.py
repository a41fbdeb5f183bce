"""Random small models, seeded: what every stage promises holds for shapes and settings that nobody chose."""

from __future__ import annotations

import warnings

import pytest
from random_models import Outcome, outcome, random_case

#: Models of the sweep, ten parts of 30, and those of the quick test: several targets, a fixed batch, one image alone.
PARTS = [range(start, start + 30) for start in range(0, 300, 30)]
QUICK = (0, 1, 2, 3, 18, 25)
#: Largest error of a model whose operands all have 8 bits and of which the calibration warns of nothing. One that
#: amplifies what changes in its images (a LayerNorm over four channels does) amplifies errors of codes too.
LARGEST_ERROR = 0.2
#: Plain QDQ is the one target whose float products ONNX Runtime may sum in another order than PyTorch does.
LAST_BITS = 3e-7


def outcome_of(seed: int, folder) -> Outcome:
    """Run a case and check what holds for each: finite outputs, usable scales, the same bits in ONNX Runtime."""
    case = random_case(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcome(case, folder)
    assert found.finite, case.what
    assert found.usable_scales, case.what
    if case.has_8_bits and not found.warned:
        assert found.error < LARGEST_ERROR * max(1.0, found.amplification), f"{case.what}: error {found.error}"
    if case.target == "generic":
        assert found.difference <= LAST_BITS, f"{case.what}: {found.difference}"
    else:
        assert found.bit_equal == 1.0, f"{case.what}: {found.difference}"
    return found


@pytest.mark.parametrize("seed", QUICK)
def test_a_random_model_verifies_bit_for_bit(tmp_path, seed):
    assert outcome_of(seed, tmp_path).bit_equal == 1.0


@pytest.mark.sweep
@pytest.mark.parametrize("seeds", PARTS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_300_random_models_verify_bit_for_bit(tmp_path, seeds):
    """With LayerNorm, softmax and GELU of the runtime on both sides; plain QDQ up to the last bits."""
    found = [outcome_of(seed, tmp_path) for seed in seeds]
    assert sum(case.bit_equal == 1.0 for case in found) >= len(found) - 2
