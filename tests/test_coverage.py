"""Every family, one small model each: traced bit-equal, every product quantized or listed, the file agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.tools import coverage
from ptq4vit_fx.tools.cli import app
from ptq4vit_fx.tools.coverage_table import Row
from ptq4vit_fx.tools.families import FAMILIES, Family, find_family

#: The scales do not matter here, that they are found for every product does: a search of seconds.
QUICK = ptq.recipes.ptq4vit().with_search(n=4, rounds=1, screen_rows=32, confirm=1, max_shift=3)

#: One of each kind, which `make test` runs: plain, folded tables, two heads, windows, class attention, a gate, rotary
#: positions, 1x1 convolutions, pooling, variable patches; traced by torch.export; of torchvision and Hugging Face.
REPRESENTATIVES = {
    *("vit", "vit_relpos", "deit_distilled", "swin", "cait", "convit", "eva02", "visformer", "pit", "naflexvit"),
    *("mobilevitv2", "efficientformer", "torchvision_vit", "hf_beit"),
}

#: Cosine of the quantized with the float model that docs/coverage.json records, measured with the full search.
RECORDED = {
    row["family"]: row["int8"]
    for row in json.loads((Path(__file__).parents[1] / "docs" / "coverage.json").read_text(encoding="utf-8"))
}
#: How many times the recorded error the quicker search may leave (measured: up to 3.6), and the cosine's own rounding.
SEARCHED_LESS, LAST_BITS = 6, 1e-6
#: No family is below this, whatever is recorded, but those of random convolutions, which amplify the last bit.
INT8 = 0.999
INT8_OF = {"mobilevit": 0.98, "fastvit": 0.98, "efficientvit_mit": 0.97} | dict.fromkeys(
    ("levit", "tiny_vit", "caformer", "repvit", "efficientvit_msra", "twins_pcpvt", "torchvision_vit"), 0.99
)

#: Products that stay float, by family; no other family has any.
FLOAT = {"coat": {"aggregate": "Conv1d is not supported"}}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(family.name, marks=() if family.name in REPRESENTATIVES else pytest.mark.sweep)
        for family in FAMILIES
    ],
)
def test_family(name):
    family = find_family(name)
    if family.source == "huggingface":
        pytest.importorskip("transformers", reason="the extra hf is not installed")
    row = coverage.cover(family, QUICK)
    assert row.problem is None
    assert row.float_ops == FLOAT.get(name, {})
    assert row.quantized_layers + row.folded_layers == row.layers
    assert row.quantized_attention == row.attention
    assert row.twins > 0
    assert row.multiplies > 0.99 or name == "coat"
    assert row.cosine >= coverage.COSINE
    assert row.int8 >= INT8_OF.get(name, INT8)
    assert 1 - row.int8 <= SEARCHED_LESS * (1 - RECORDED[name]) + LAST_BITS


def test_representatives_are_families():
    assert {family.name for family in FAMILIES} >= REPRESENTATIVES
    assert {find_family(name).source for name in REPRESENTATIVES} == {"timm", "torchvision", "huggingface"}


def test_a_family_that_cannot_is_a_row_with_the_reason_and_exit_code_1(tmp_path, monkeypatch):
    broken = Family("broken", "timm", "vit_tiny_patch16_224", 63, {"img_size": 64})
    works = Row("fine", "model", tracer="trace", layers=2, quantized_layers=2)
    cover = coverage.cover
    monkeypatch.setattr(coverage, "cover", lambda family: cover(family) if family is broken else works)
    rows = coverage.run_coverage([broken, find_family("vit")], tmp_path, lambda line: None)
    assert rows[0].problem is not None
    assert "63" in rows[0].problem
    assert "1 of 2 families work." in (tmp_path / "coverage.md").read_text()
    assert [row["family"] for row in json.loads((tmp_path / "coverage.json").read_text())] == ["broken", "fine"]
    monkeypatch.setattr(coverage, "cover", lambda family: rows[0])
    assert CliRunner().invoke(app, ["coverage", "--family", "vit", "--out", str(tmp_path)]).exit_code == 1


def test_an_unknown_family_names_near_ones():
    result = CliRunner().invoke(app, ["coverage", "--family", "swim"])
    assert result.exit_code == 1
    assert "did you mean swin" in result.output


def test_a_folder_that_cannot_be_is_refused_before_any_family_runs(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["coverage", "--family", "vit", "--out", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert "error: coverage --out" in result.output
    assert "vit: works" not in result.output
