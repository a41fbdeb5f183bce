"""What is near an input that is accepted: bytes with a few of them changed, JSON with one value changed."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

#: Values that a JSON entry never should have: wrong types, numbers out of every range, text that prints as something.
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e-45, 1e38, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "8", "\x00", "\x1b[31m", "\ud800", "²", "a\nb", "x" * 9999),
    *([], {}, [[]], {"": {}}, [None], {"kind": "Uniform"}),
)
values = st.recursive(
    st.sampled_from(STRANGE) | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
).map(copy.deepcopy)  # what is drawn is changed later


@st.composite
def changed_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw bytes with one to four changes: bits flipped, parts overwritten, removed, repeated, the end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), start + draw(st.integers(1, 64)))
        change = draw(st.sampled_from(("flip", "flip", "overwrite", "remove", "repeat", "cut", "insert")))
        if change == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif change == "overwrite":
            data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
        elif change == "remove":
            del data[start:end]
        elif change == "repeat":
            data[start:start] = data[start:end]
        elif change == "cut":
            del data[start:]
        else:
            data[start:start] = draw(st.binary(max_size=16))
    return bytes(data)


@st.composite
def changed_json(draw: st.DrawFn, record: Any) -> Any:
    """Draw a JSON value that differs from a record in one to three places, at any depth."""
    changed = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 3))):
        changed = _change(draw, changed)
    return changed


def _change(draw: st.DrawFn, value: Any) -> Any:
    """Change a value in one place: itself, or one of its entries."""
    keys = (
        sorted(value, key=str) if isinstance(value, dict) else list(range(len(value) if isinstance(value, list) else 0))
    )
    if not keys or draw(st.integers(0, 9)) == 0:
        return draw(values)
    key = draw(st.sampled_from(keys))
    change = draw(st.sampled_from(("deeper", "deeper", "deeper", "replace", "remove", "move")))
    if change == "deeper":
        value[key] = _change(draw, value[key])
    elif change == "replace":
        value[key] = draw(values)
    elif change == "move":  # to another entry's place, or under another name
        other = (
            draw(st.sampled_from(keys) | st.text(max_size=5))
            if isinstance(value, dict)
            else draw(st.sampled_from(keys))
        )
        value[other] = value[key]
    else:
        del value[key]
    return value
