"""What `ptq4vit bench` found: a table, and a line in plain words on what pays on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ptq4vit_fx.export.proof.latency import Spread

#: What other runtimes need is another file; `ptq4vit targets` has the flags.
ANOTHER_FILE = {"openvino": "--target openvino", "onnxruntime": "--target onnxruntime"}
COLUMNS = ("runtime", "file", "ms", "quartiles", "images/s", "times as long")


@dataclass(frozen=True)
class Timed:
    """Milliseconds of a file in a runtime. ratio: how many times longer than the user's file there, None of itself."""

    runtime: str
    file: str
    milliseconds: Spread
    ratio: Spread | None


@dataclass(frozen=True)
class BenchReport:
    """What each file took. images: at a time. threads: 0: the runtime's choice. problems: what did not run, and why."""

    file: str
    rows: tuple[Timed, ...]
    float_files: tuple[str, ...]
    images: int
    threads: int
    rounds: int
    cpu: str
    cores: int
    versions: Mapping[str, str]
    problems: tuple[str, ...] = ()

    def shown(self, name: str) -> str:
        """Return a file's name without its folder, unless another one has the same."""
        short = os.path.basename(name)
        same = {row.file for row in self.rows if os.path.basename(row.file) == short}
        return name if len(same) > 1 else short

    def images_per_second(self, row: Timed) -> float:
        return 1000 * self.images / row.milliseconds.median

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}" if self.threads else "the runtime's own threads"
        images = "one image" if self.images == 1 else f"{self.images} images"
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        lines = [
            f"{self.cpu}; {self.cores} cores",
            f"{versions}; {images} at a time, {threads}, medians of {self.rounds} rounds in turn",
            *_aligned([COLUMNS, *map(self._cells, self.rows)]),
            *self.problems,
            *self.verdict(),
        ]
        return "\n".join(lines)

    def _cells(self, row: Timed) -> tuple[str, ...]:
        own, ratio = row.milliseconds, row.ratio
        quartiles = f"{own.low:.4g} to {own.high:.4g}"
        beside = "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        return (
            row.runtime,
            self.shown(row.file),
            f"{own.median:.4g}",
            quartiles,
            f"{self.images_per_second(row):.4g}",
            beside,
        )

    def verdict(self) -> tuple[str, ...]:
        """Return what pays on this machine, a sentence each."""
        lines = [line for runtime in self.versions for line in self._in_runtime(runtime)]
        if not any(row.ratio for row in self.rows):
            lines.append("add --against FLOAT.onnx (of `quantize --float-onnx`) or a model's name to compare")
        if len(self.versions) > 1:
            best = min(self.rows, key=lambda row: row.milliseconds.median)
            lines.append(
                f"the fastest here is {self.shown(best.file)} in {best.runtime}: {best.milliseconds.median:.3g} ms"
            )
        return tuple(lines)

    def _in_runtime(self, runtime: str) -> Iterator[str]:
        """Yield what the file gains over each other one in a runtime, and what to do where it loses to float."""
        for row in self.rows:
            if row.runtime != runtime or row.ratio is None:
                continue
            low, high, middle = row.ratio.low, row.ratio.high, row.ratio.median
            own, other = self.shown(self.file), f"{self.shown(row.file)} in {runtime}"
            if low > 1:
                yield f"{own} pays: {middle:.2f} times as fast as {other}"
            elif high < 1:
                advice = ANOTHER_FILE[runtime] if row.file in self.float_files else ""
                more = f"; if it was written for another runtime, quantize with {advice}" if advice else ""
                yield f"{own} does not pay: it takes {1 / middle:.2f} times as long as {other}{more}"
            else:
                yield f"no clear difference between {own} and {other}: {low:.2f} to {high:.2f} times as fast"

    def to_dict(self) -> dict[str, Any]:
        """Return every number, JSON-ready."""
        rows = [asdict(row) | {"images_per_second": self.images_per_second(row)} for row in self.rows]
        return asdict(self) | {"rows": rows, "verdict": self.verdict()}


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows of cells as lines: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 2
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
