"""Try every target for its share of the time, print its figures, write the page: `python -m fuzz SECONDS [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import hypothesis

from fuzz.calibrations import calibration_loader
from fuzz.files import checkpoint_reader, image_reader, onnx_reader
from fuzz.plans import plan_parser
from fuzz.target import Figures, Target, fuzz

#: What is fuzzed: functions that make a target, for its good input takes seconds. A new target is a line here.
TARGETS: tuple[Callable[[], Target], ...] = (
    plan_parser,
    calibration_loader,
    image_reader,
    onnx_reader,
    checkpoint_reader,
)

PAGE = """# Fuzzing

`make fuzz` writes this page (`make fuzz SECONDS=60` for a shorter run). Every reader below gets inputs that differ from
a good one in a few bytes or values, or that are nothing of the kind. It may return a value or raise PTQError, in one
line; any other exception, and any warning but PTQWarning, ends the run with the smallest input that does it.
`make test` tries some hundred inputs of each.

| reads | inputs tried | accepted | refused | seconds | slowest input |
|---|---|---|---|---|---|
{rows}

Hypothesis {version}, {seconds:.0f} seconds.
"""


def page(figures: Iterable[Figures]) -> str:
    """Return the page that documents a run."""
    rows = [
        f"| {f.target.reads} | {f.accepted + f.refused:,} | {f.accepted:,} | {f.refused:,} | {f.seconds:.0f} "
        f"| {f.slowest:.2f} s |"
        for f in figures
    ]
    return PAGE.format(rows="\n".join(rows), version=hypothesis.__version__, seconds=sum(f.seconds for f in figures))


def main(seconds: float, out: Path | None) -> None:
    """Fuzz every target; an exception ends it with exit code 1."""
    figures = []
    for make in TARGETS:
        target = make()
        found = fuzz(target, seconds / len(TARGETS))
        tried = found.accepted + found.refused
        print(f"{target.name}: {tried:,} inputs, {found.accepted:,} accepted, {found.refused:,} refused", flush=True)
        figures.append(found)
    if out is not None:
        out.write_text(page(figures), encoding="utf-8")


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
