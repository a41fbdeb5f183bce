"""The plan parser, which reads calibration files and the metadata of ONNX files."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from fuzz.models import calibrated
from fuzz.mutations import changed_bytes, changed_json
from fuzz.target import Target
from ptq4vit_fx import QuantPlan


def read_plan(text: str) -> None:
    """Read a plan, and do with it what is done with one of a file."""
    plan = QuantPlan.from_json(text, "inspect", "model.onnx")
    assert QuantPlan.from_json(plan.to_json()) == plan
    assert plan.table()


def plan_parser() -> Target:
    """Return the plan of a calibrated model with values or characters changed, and other text."""
    text = calibrated().plan.to_json()
    changed_text = changed_bytes(text.encode()).map(lambda data: data.decode(errors="surrogateescape"))
    changed_values = changed_json(json.loads(text)).map(json.dumps)
    return Target("plan", "`QuantPlan.from_json`", changed_values | changed_text | st.text(), read_plan)
