"""Run every case and write docs/what_works.md: `make what-works`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from rich.progress import track

import ptq4vit_fx as ptq
from brought import AREAS, Case, cases

DOCUMENT = Path(__file__).parents[2] / "docs" / "what_works.md"
LEGEND = """# What people bring

Each line is a test (`tests/brought/`): a small model, state, container or folder, taken through tracing, calibration,
conversion, export and ONNX Runtime, with a check of the values at every step. What does not work is refused with the
sentence that stands beside it. Written by `make what-works`; families of models are in [coverage.md](coverage.md).
"""


#: Where this machine has its files; what follows is the same on all of them.
FOLDERS = re.compile(r"(/[^\s:`']*)?/(site-packages/|tests/|tmp\w{8}/?)")


def outcome(case: Case) -> str:
    """Return `works`, or the sentence that refuses the case; whatever else is raised is a fault and stays one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case.run()
        except ptq.PTQError as error:
            return f"refused: {FOLDERS.sub('', str(error))}"
    return "works"


def markdown(results: list[tuple[Case, str]]) -> str:
    """Return the document: the counts, and a table per area."""
    works = sum(text == "works" for _, text in results)
    faults = sum(text.startswith("FAULT") for _, text in results)
    lines = [LEGEND, f"{works} work, {len(results) - works - faults} are refused, {faults} do anything else."]
    for area in AREAS:
        rows = [(case.title, text) for case, text in results if case.area == area]
        cells = [
            "| what | |",
            "| --- | --- |",
            *(f"| {title} | {text.replace('|', chr(92) + '|')} |" for title, text in rows),
        ]
        lines += ["", f"## {area.capitalize()}", "", *cells] if rows else []
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all cases; return 1 if any of them does something else than it must."""
    results = []
    for case in track(cases(), "what people bring"):
        try:
            text = outcome(case)
        except Exception as error:  # noqa: BLE001 - the table says what happened
            text = f"FAULT {type(error).__name__}: {error}".splitlines()[0]
        expected = text.startswith("refused") and case.refused in text if case.refused else text == "works"
        results.append((case, text if expected else f"FAULT {text}"))
    DOCUMENT.write_text(markdown(results), encoding="utf-8")
    faults = [f"{case.name}: {text}" for case, text in results if text.startswith("FAULT")]
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
