"""What people bring works, or is refused with the sentence that belongs to it: `brought/` holds the cases."""

from __future__ import annotations

from typing import Any

import pytest
from brought import Case, cases

import ptq4vit_fx as ptq


def _parameters() -> list[Any]:
    return [pytest.param(c, id=c.name, marks=[] if c.quick else [pytest.mark.sweep]) for c in cases()]


@pytest.mark.filterwarnings("ignore::ptq4vit_fx.PTQWarning")
@pytest.mark.parametrize("case", _parameters())
def test_case(case: Case) -> None:
    if case.refused is None:
        case.run()
        return
    with pytest.raises(ptq.PTQError) as caught:
        case.run()
    assert case.refused in str(caught.value)


def test_names_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
