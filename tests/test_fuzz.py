"""The fuzz targets for a few seconds each, and that the loop notices what it is there for."""

from __future__ import annotations

import warnings

import pytest
from fuzz.__main__ import TARGETS, page
from fuzz.target import ROUND, Target, fuzz
from hypothesis import strategies as st

from ptq4vit_fx import PTQError, PTQWarning


@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)
def test_readers_return_or_refuse_and_do_nothing_else(make):
    figures = fuzz(make(), seconds=2)
    assert figures.refused > ROUND / 4  # else the inputs are too good
    assert f"| {figures.accepted + figures.refused:,} | {figures.accepted:,} |" in page([figures])


def reader(raised):
    def read(value):
        if value > 1000:
            raise raised

    return Target("reader", "nothing", st.integers(0, 10**6), read)


@pytest.mark.parametrize("raised", [KeyError("raw"), RuntimeWarning("overflow")])
def test_the_loop_ends_with_what_no_reader_may_raise(raised):
    with pytest.raises(type(raised)) as caught:
        fuzz(reader(raised), seconds=5)
    assert "value=1001" in "".join(caught.value.__notes__)  # the smallest


def test_sentences_and_warnings_of_this_package_are_no_failure():
    def read(value):
        warnings.warn("odd", PTQWarning, stacklevel=2)
        if value % 2:
            raise PTQError("odd")

    figures = fuzz(Target("reader", "nothing", st.integers(), read), seconds=0)
    assert figures.accepted + figures.refused == ROUND
    assert 0 < figures.refused < ROUND
