"""JSON that anybody may have written: a plan, or one sentence that names the file, and never another error."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest

import ptq4vit_fx as ptq
from ptq4vit_fx.inputs.records import DEEPEST, Place, read_as, read_json

SITE = "head:lhs"
PLACE = Place("read", "a.file")


def plan_with(record: Any, *path: Any, value: Any) -> str:
    """Return the JSON of a plan with another value at a path."""
    changed = copy.deepcopy(record)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(changed)


@pytest.fixture(scope="module")
def record(small_converted):
    return json.loads(small_converted.plan.to_json())


@pytest.mark.parametrize("bits", [0, 1, 9, 99, "8", True, 8.0, None, [8], 10**30, float("nan"), float("inf")])
def test_bits_that_are_none_are_refused(record, bits):
    with pytest.raises(ptq.PTQError, match=r"^inspect: model\.onnx: .*(integer|64 bits)"):
        ptq.QuantPlan.from_json(plan_with(record, "quantizers", SITE, "bits", value=bits), "inspect", "model.onnx")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("ops",), 5, r"ops: expected a list, got 5"),
        (("ops", 0, "name"), None, r"ops\[0\]\.name: expected text, got None"),
        (("ops", 0, "kind"), "lstm", r"ops\[0\]\.kind: expected 'linear' or 'conv2d' or 'matmul', got 'lstm'"),
        (("ops", 0, "lhs_source"), "gulp", r"ops\[0\]: .*expected one of softmax, gelu, .*got 'gulp'"),
        (("ops", 0, "rhs_is_weight"), 1, r"rhs_is_weight: expected true or false, got 1"),
        (("ops", 0, "stride"), [4], r"ops\[0\]\.stride: expected a list of 2, got \[4\]"),
        (("ops", 0, "stride"), [4, 0], r"convolution: expected positive sizes"),
        (("ops", 0, "padding"), "some", r"padding: expected a list or 'same' or 'valid', got 'some'"),
        (("ops", 0, "colour"), 1, r"ops\[0\]\.QuantOp: expected fields that this version knows, got colour"),
        (("ops", 1, "name"), "patch_embed.proj", r"'patch_embed\.proj': expected one product of that name, got more"),
        (("ops", 0, "name"), "other", r"expected a quantizer for both operands of every product, .*got"),
        (("quantizers", "other:lhs"), {"kind": "Uniform"}, r"'other:lhs': .*got a quantizer of no operand"),
        (("quantizers", SITE), {"bits": 8}, r"kind: expected Uniform or TwinUniform or Unquantized, got None"),
        (
            ("quantizers", SITE, "kind"),
            ["Uniform"],
            r"kind: expected Uniform or TwinUniform or Unquantized, got \['Uniform'\]",
        ),
        (("quantizers", SITE, "granularity"), "row", r"granularity: expected 'tensor' or .*got 'row'"),
        (("quantizers", SITE, "groups"), 0, r"groups: expected 1 or more, got 0"),
        (("quantizers", SITE, "minimum"), float("nan"), r"minimum: expected 0 or more, .*minimum=nan"),
        (("searches", "head", "beta"), float("inf"), r"alpha and beta: expected 0 <= alpha < beta"),
        (("searches", "head", "n"), "8", r"searches\.head\.n: expected an integer, got '8'"),
        (("searches", "head", "screen_rows"), 1.5, r"screen_rows: expected an integer or null, got 1\.5"),
        (("searches", "head", "metric"), "m" * 999, r"got 'm{59}\.\.\.; "),
        (("float_ops",), [{"name": "a"}], r"float_ops\[0\]\.FloatOp: expected a field reason, got none"),
        (("recipe",), "\ud800", r"recipe: expected text, got '\\ud800'"),
    ],
)
def test_what_a_plan_cannot_say_is_refused_where_it_says_it(record, path, value, said):
    with pytest.raises(ptq.PTQError, match=said) as refused:
        ptq.QuantPlan.from_json(plan_with(record, *path, value=value), "inspect", "model.onnx")
    assert re.match(r"inspect: model\.onnx: .*; the file is damaged.*write it again", str(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("absent", ["ops", "quantizers"])
def test_a_plan_without_products_or_quantizers_is_refused(record, absent):
    with pytest.raises(ptq.PTQError, match=f"QuantPlan: expected a field {absent}, got none"):
        ptq.QuantPlan.from_json(json.dumps({key: value for key, value in record.items() if key != absent}))


def test_fields_with_defaults_may_be_absent(record):
    for absent in ("searches", "float_ops", "recipe"):
        record = {key: value for key, value in record.items() if key != absent}
    assert ptq.QuantPlan.from_json(json.dumps(record)).recipe == "custom"


@pytest.mark.parametrize(
    "text",
    ["", "[1, 2", "null", "5", "NaN", "[]", '{"a": 1, "a": 2}', "[" * 100_000, "9" * 9_999, "\x00\x1b[31m", None],
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ptq.PTQError, match=r"^inspect: model\.onnx: expected (JSON|an object with ops)") as refused:
        ptq.QuantPlan.from_json(text, "inspect", "model.onnx")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


def test_brackets_may_be_nested_as_deep_as_the_limit():
    fitting = "[" * DEEPEST + "1" + "]" * DEEPEST
    assert read_json(fitting, PLACE)
    with pytest.raises(ptq.PTQError, match="nested too deep"):
        read_json(f"[{fitting}]", PLACE)


@dataclass(frozen=True)
class Circle:
    radius: float


@dataclass(frozen=True)
class Square:
    side: int
    corner: tuple[int, int] | Literal["centre"] = (0, 0)
    tags: dict[str, tuple[str, ...]] | None = None


def test_values_are_read_by_their_types_alone():
    value = {"kind": "Square", "side": 2, "corner": [1, 2], "tags": {"a": ["b", "c"]}}
    assert read_as(Circle | Square, value, PLACE) == Square(2, (1, 2), {"a": ("b", "c")})
    assert read_as(Circle | Square, {"kind": "Circle", "radius": 3}, PLACE) == Circle(3.0)
    assert read_as(tuple[float, float], [1, float("inf")], PLACE) == (1.0, float("inf"))
    with pytest.raises(
        ptq.PTQError, match=r"^read: a\.file: tags: expected an object or null, got \{'a': \['b', 3\]\}; "
    ):
        read_as(Circle | Square, value | {"tags": {"a": ["b", 3]}}, PLACE)
    with pytest.raises(ptq.PTQError, match=r"^read: a\.file: \[1\]\.a: expected text, got 3; "):
        read_as(tuple[dict[str, str], ...], [{}, {"a": 3}], PLACE)
    with pytest.raises(ptq.PTQError, match=r"radius: expected a number, got False"):
        read_as(Circle, {"radius": False}, PLACE)
