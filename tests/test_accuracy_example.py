"""The proof that examples/accuracy.py prints, on made-up logits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import load_script

from ptq4vit_fx.export.proof.comparison import compare

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "accuracy.py"


@pytest.fixture(scope="module")
def accuracy():
    return load_script(SCRIPT)


def comparison(changed):
    """1,000 images of class 1; the file says class 2 on the first `changed` of them."""
    simulated = np.tile(np.array([[0, 2, 1, 0]], np.float32), (1000, 1))
    actual = simulated.copy()
    actual[:changed, 2] = 3
    return compare(simulated, actual)


def test_disagreements_name_both_classes():
    (found,) = comparison(1).disagreements
    assert (found.image, found.simulated, found.actual) == (0, 1, 2)
    assert (found.margin, found.difference) == (1, 2)


@pytest.mark.parametrize(
    ("changed", "right", "points", "holds"),
    [
        (0, [1], "+0.00", True),
        (1, [1], "-0.10", True),
        (1, [2], "+0.10", True),
        (2, [1, 1], "-0.20", False),
        (2, [1, 2], "+0.00", True),
        (3, [1, 2, 0], "+0.00", False),
    ],
)
def test_the_proof_is_of_agreement_and_of_top1(accuracy, capsys, changed, right, points, holds):
    labels = torch.ones(1000, dtype=torch.int64)
    labels[: len(right)] = torch.tensor(right)
    same = comparison(changed)
    report = SimpleNamespace(images=1000, same_functions=same, simulation=same)
    assert accuracy.prove(report, labels) == holds
    printed = capsys.readouterr().out
    assert f"top-1 difference {points} points" in printed
    assert ("DOES NOT HOLD" in printed) != holds
