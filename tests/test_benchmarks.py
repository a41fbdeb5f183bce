"""What `make bench` says of two rows: a ratio has moved where the quartiles do not overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "record.py"


@pytest.fixture(scope="module")
def record() -> Any:
    return load_script(SCRIPT)


def row(commit: str, low: float, high: float, machine: str = "a CPU") -> dict[str, Any]:
    ratio = {"low": low, "median": (low + high) / 2, "high": high}
    return {"commit": commit, "machine": machine, "versions": {"torch": "2"}, "ratios": {"exact": ratio}}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (2.0, 2.2, "nothing moved since abc by more than the noise"),
        (2.15, 2.4, "nothing moved since abc by more than the noise"),
        (1.6, 1.8, "exact: 2.10 at abc, 1.70 now"),
        (2.4, 2.6, "exact: 2.10 at abc, 2.50 now"),
    ],
)
def test_what_moved(record, low, high, said):
    assert record.moved(row("abc", 2.0, 2.2), row("def", low, high)) == [said]


def test_rows_of_another_machine_are_no_measure(record):
    rows = [row("abc", 2.0, 2.2), row("def", 1.0, 1.1, machine="another")]
    now = row("now", 2.0, 2.2)
    assert record.last_like(rows, now)["commit"] == "abc"
    assert record.last_like(rows[1:], now) is None
    assert record.moved(None, now) == ["no row of this machine and these versions yet: this is the first"]
