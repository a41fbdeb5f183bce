"""What people bring: models, states, containers, data; each is a case that works or is refused with a clear sentence.

    @brought("state", "a layer with a forward hook")
    def hooked_layer() -> None:
        model, images = vit(), pictures()
        model.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: output * 3)
        pipeline(model, images)

A case takes what it brings through the package and asserts that the values are right. It works if nothing is raised;
with `refused=` it must raise a PTQError of which this text is a part. Whatever else happens is a fault.
`make what-works` runs all of them and writes docs/what_works.md.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

#: The parts of the table, in its order.
AREAS = ("state", "tracing", "model", "task", "input", "data", "file")


@dataclass(frozen=True)
class Case:
    """One thing that people bring; refused: a part of the sentence that it is refused with, None where it works."""

    area: str
    title: str
    run: Callable[[], None]
    refused: str | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


_CASES: list[Case] = []


def brought(
    area: str, title: str, *, refused: str | None = None, quick: bool = False
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Add a case to the table; quick: it represents its kind in `make test`, the others run in `make test-all`."""
    assert area in AREAS, f"{area} is none of {AREAS}"

    def add(run: Callable[[], None]) -> Callable[[], None]:
        _CASES.append(Case(area, title, run, refused, quick))
        return run

    return add


def cases() -> list[Case]:
    """Return every case of the modules of this package, in the order of AREAS and of their files."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.endswith("_cases"):
            importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_CASES, key=lambda case: AREAS.index(case.area))
