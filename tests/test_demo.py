"""The demo, whole: every row, every file, the picture."""

from __future__ import annotations

import re

import onnx
import pytest
from PIL import Image
from rich.console import Console

from ptq4vit_fx.tools import demo
from ptq4vit_fx.tools.demo import RUNS, Run, run_demo
from ptq4vit_fx.tools.phases import Phases


@pytest.mark.parametrize("runs", [RUNS[-1:], pytest.param(RUNS, marks=pytest.mark.sweep)], ids=["one row", "all rows"])
def test_demo_fills_its_table_and_saves_its_files(tmp_path, monkeypatch, runs: tuple[Run, ...]):
    monkeypatch.setattr(demo, "RUNS", runs)
    console = Console(record=True, width=120)
    found = run_demo(tmp_path / "out", Phases(console, shown=False))
    console.print(found.table())
    text = console.export_text()
    rows = {
        (recipe, int(bits)): [float(value) for value in re.findall(r"([\d.]+)%", line)]
        for line in text.splitlines()
        if (cells := re.search(r"(base_ptq|ptq4vit) .*W(\d)A", line))
        for recipe, bits in [cells.groups()]
    }
    assert set(rows) == {(run.recipe, run.bits) for run in runs}
    for (recipe, bits), (reference, simulated, deployed) in rows.items():
        assert reference > 98
        assert simulated == deployed
        if bits == 8:
            assert simulated > reference - 0.6
        if recipe == "ptq4vit":
            assert simulated > reference - 2.0
    if ("base_ptq", 4) in rows:
        assert rows["ptq4vit", 4][1] > rows["base_ptq", 4][1]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".onnx", ".png"}
    for path in (tmp_path / "out").glob("*.onnx"):
        onnx.checker.check_model(onnx.load(path), full_check=True)
    assert len(list((tmp_path / "out").glob("*.onnx"))) == len(runs)
    with Image.open(tmp_path / "out" / "twin_grids.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").resize((60, 40)).getcolors(maxcolors=2400)) > 20
