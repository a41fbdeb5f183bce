"""The notebook of examples/ runs from its first cell to its last, and what it says of the file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

TOUR = Path(__file__).resolve().parents[1] / "examples" / "tour.ipynb"


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_the_tour_runs(tmp_path, monkeypatch):
    """As `make tour` does with a kernel; here without one, so that an installation for tests suffices."""
    monkeypatch.chdir(tmp_path)
    with mpl.rc_context({"backend": "agg"}):
        names: dict[str, Any] = {"__name__": "__main__"}
        for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{TOUR.name} {cell['id']}", "exec", dont_inherit=True), names)
    assert names["verified"].ok
    assert names["compared"].score > 0.95
    assert names["scores"]["base_ptq"] < names["scores"]["ptq4vit"]
    assert (tmp_path / "report.html").stat().st_size > 10_000
