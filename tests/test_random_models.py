"""Random small models, seeded: what every stage promises holds for shapes and settings that nobody chose."""

from __future__ import annotations

import warnings

import pytest
from random_models import Outcome, outcome, random_case

#: Models of the sweep, and those of the quick test: every kind of target, a fixed batch, one image alone.
SEEDS = range(300)
QUICK = (0, 1, 2, 3, 18, 25)
#: Largest error of a model whose operands all have 8 bits and of which the calibration warns of nothing.
LARGEST_ERROR = 0.2


def outcome_of(seed: int, folder) -> Outcome:
    """Run a case and check what holds for each: finite outputs, usable scales, the same bits in ONNX Runtime."""
    case = random_case(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcome(case, folder)
    assert found.finite, case.what
    assert found.usable_scales, case.what
    assert found.error < LARGEST_ERROR or found.warned or not case.has_8_bits, f"{case.what}: error {found.error}"
    return found


@pytest.mark.parametrize("seed", QUICK)
def test_a_random_model_verifies_bit_for_bit(tmp_path, seed):
    assert outcome_of(seed, tmp_path).bit_equal == 1.0


@pytest.mark.sweep
def test_300_random_models_verify_bit_for_bit(tmp_path):
    found = {seed: outcome_of(seed, tmp_path) for seed in SEEDS}
    differing = {seed: case.difference for seed, case in found.items() if case.bit_equal < 1.0}
    assert differing == {}
