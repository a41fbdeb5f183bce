"""A good graph whose metadata says anything."""

from __future__ import annotations

import json
from typing import Any

import onnx
from onnx import helper

from hostile import EVIL, Case, changed
from ptq4vit_fx.export import metadata

DEEP = "[" * 100_000
OTHER_PLAN = {"ops": [], "quantizers": {}, "searches": {}, "float_ops": [{"name": EVIL, "reason": EVIL}]}
#: How images are prepared, as `ptq4vit quantize` records it, for images of 16 pixels.
PREPROCESSING: dict[str, Any] = {
    "input_size": [3, 16, 16],
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "crop_pct": 0.9,
    "crop_mode": "center",
}
#: Entries of the metadata, by the names of their keys in `export/metadata.py`; None takes one away.
ENTRIES: dict[str, dict[str, str | None]] = {
    **{f"without {key}": {key: None} for key in ("PLAN", "TARGET", "VERSION", "CALIBRATION", "PROVENANCE", "SCALES")},
    "plan: no JSON": {"PLAN": "no"},
    "plan: a list": {"PLAN": "[]"},
    "plan: null": {"PLAN": "null"},
    "plan: empty": {"PLAN": "{}"},
    "plan: brackets": {"PLAN": DEEP},
    "plan: digits": {"PLAN": "9" * 5000},
    "plan: other fields": {"PLAN": json.dumps({"ops": 1, "quantizers": [], "searches": None, "float_ops": "x"})},
    "plan: of another model": {"PLAN": json.dumps(OTHER_PLAN)},
    "scales: no JSON": {"SCALES": "{"},
    "scales: a list": {"SCALES": "[1]"},
    "scales: numbers": {"SCALES": '{"a": 1}'},
    "scales: no base64": {"SCALES": '{"a": "***"}'},
    "scales: three bytes": {"SCALES": '{"a": "AAAA"}'},
    "outputs: a list": {"OUTPUTS": "[1, 2]"},
    "outputs: no mapping": {"OUTPUTS": '"abc"'},
    "outputs: of nothing": {"OUTPUTS": '{"logits": null}'},
    "outputs: brackets": {"OUTPUTS": DEEP},
    "outputs: others": {"OUTPUTS": '{"logits": "other"}'},
    "provenance: no JSON": {"PROVENANCE": "no"},
    "provenance: a list": {"PROVENANCE": "[]"},
    "provenance: a number": {"PROVENANCE": '{"preprocessing": 3}'},
    "provenance: an empty record": {"PROVENANCE": '{"preprocessing": {}}'},
    "what a terminal obeys": {"VERSION": EVIL, "TARGET": EVIL, "CALIBRATION": EVIL},
    "what a console styles": {"VERSION": "[bold]", "TARGET": "[/]", "CALIBRATION": ":bomb:"},
}
#: Values of the preprocessing.
PREPARED: dict[str, tuple[Any, ...]] = {
    "crop_pct": (0, -1, 1e-9, 1e300, float("nan"), "x", None, []),
    "mean": ("x", [], [1], [0.5] * 4, 3),
    "std": ([0, 0, 0], [float("nan")] * 3, [-1, 1, 1]),
    "interpolation": ("x", 3, None, "random"),
    "crop_mode": ("x", 3, "border"),
    "re_prob": (1.0,),
    "is_training": (True,),
    "input_size": ("x",),
}


def saying(entries: dict[str, str | None]) -> Case:
    """Return the case of these entries."""
    named = {getattr(metadata, f"{key}_KEY"): value for key, value in entries.items()}

    def change(model: onnx.ModelProto) -> None:
        said = {entry.key: entry.value for entry in model.metadata_props} | named
        helper.set_model_props(model, {key: value for key, value in said.items() if value is not None})

    return changed(change)


def prepared(key: str, value: Any) -> Case:
    """Return the case of a value in the preprocessing."""
    return saying({"PROVENANCE": json.dumps({"preprocessing": PREPROCESSING | {key: value}})})


RECORDS: dict[str, Case] = {f"metadata: {name}": saying(entries) for name, entries in ENTRIES.items()}
RECORDS |= {f"{key}: {value!r}": prepared(key, value) for key, values in PREPARED.items() for value in values}
