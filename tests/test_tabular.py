"""Values that show themselves: one line, a small table, a DataFrame; whatever stands in names."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest

import ptq4vit_fx as ptq
from ptq4vit_fx.export.proof.comparison import compare
from ptq4vit_fx.export.proof.float_figures import against_float
from ptq4vit_fx.plan import FloatOp
from ptq4vit_fx.views.tabular import MOST_ROWS, Tabular


@pytest.fixture(scope="module")
def shown(small_converted, small_images, small_vit) -> dict[str, Tabular]:
    """A value of every kind that shows itself."""
    logits = {"logits": small_vit(small_images).detach().numpy()}
    same = compare(logits["logits"], logits["logits"])
    layers = ptq.VerifyReport(same, same, None, False, 1.0, None)  # type: ignore[arg-type]
    return {
        "Calibration": small_converted.calibration,
        "QuantPlan": small_converted.plan,
        "QConfigMapping": ptq.recipes.best(4, 8).set_module_name("head", None).with_bits("blocks.0", w=8),
        "ExportReport": ptq.ExportReport(Path("m.onnx"), 2_000_000, 8_000_000, {"MatMul": 3}, 16, 20, "generic"),
        "VerifyReport": layers,
        "AgainstFloat": against_float(logits, logits),
    }


BRIEFS = {
    "Calibration": "Calibration(28 of 28 sites, 12 images, recipe best(8, 8, weights='channel', twins='exact'))",
    "QuantPlan": "QuantPlan(14 products, 28 sites, 0 left float, recipe best(8, 8, weights='channel', twins='exact'))",
    "QConfigMapping": "QConfigMapping(best(4, 8, weights='channel', twins='exact'), 3 rules)",
    "ExportReport": "ExportReport(m.onnx, 2.00 MB, opset 20, target generic, 16 sites)",
    "VerifyReport": "VerifyReport(the file computes the simulation, bit-equal on 100.0% of 12 images)",
    "AgainstFloat": "AgainstFloat(same class on 12 of 12 images: 100.0% (95%: 75.8% to 100.0%))",
}


@pytest.mark.parametrize("name", BRIEFS)
def test_a_value_is_one_line_and_a_table(shown, name):
    assert repr(shown[name]) == BRIEFS[name]
    rows = shown[name].records()
    assert all(row.keys() == rows[0].keys() for row in rows)
    table = shown[name]._repr_html_()
    assert table.count("<tr>") == (min(len(rows), MOST_ROWS) + 1 if rows else 0)
    assert (f"{len(rows) - MOST_ROWS} more rows" in table) is (len(rows) > MOST_ROWS)


def test_what_the_tables_say(shown):
    first, last, change = shown["QConfigMapping"].records()
    assert (first["rule"], first["weight"], first["softmax"]) == ("global", "uniform4/channel", "twin8/softmax")
    assert (last["rule"], last["key"], last["weight"]) == ("module name", "head", None)
    assert (change["rule"], change["key"], change["weight"]) == ("bits w8", "blocks.0", None)
    assert {"activation", "weight", "matmul", "softmax", "gelu", "convolved", "kernel", "image", "search"} == {
        entry.name for entry in fields(ptq.QConfig)
    }  # whoever adds an operand adds its column
    assert "<td>head</td><td></td>" in shown["QConfigMapping"]._repr_html_()
    assert [row["site"] for row in shown["Calibration"].records()] == list(shown["Calibration"].params)
    assert shown["AgainstFloat"].records()[0]["snr"] == float("inf")


def test_names_are_text_and_nothing_else():
    plan = ptq.QuantPlan((), {}, float_ops=(FloatOp("<script>\x1b\u202e", "a & b"),), recipe="<b>")
    table = plan._repr_html_()
    assert "<script>" not in table
    assert "&lt;script&gt;\\x1b\\u202e" in table
    assert "recipe &lt;b&gt;" in table


def test_a_data_frame_where_pandas_is(shown):
    pandas = pytest.importorskip("pandas")
    frame = shown["Calibration"].to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.site) == list(shown["Calibration"].params)


def test_a_sentence_where_pandas_is_not(shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ptq.PTQError, match=r"QuantPlan.to_frame: pandas: .* take .records\(\), a list of dictionaries"):
        shown["QuantPlan"].to_frame()
