"""The phases of a command: what is shown of them while they last, and the seconds that each took."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from rich.console import Console

from ptq4vit_fx.inputs.progress import Display, Show, UnderWay, show_nothing

IMPORT, MODEL, READ, TRACE = "import torch and ONNX Runtime", "read the model", "read images", "trace the model"
CONVERT, EXPORT, VERIFY = "convert", "export to ONNX", "verify in ONNX Runtime"
CALIBRATE, TUNE, CLASSIFY = "calibrate", "tune", "classify images"
COMPARE, FLOAT, MEASURE, REPORT = "compare with float", "write the float file", "measure", "write the report"
DEMO, ROUNDS = "quantize the digits model", "time files in turn"
#: Seconds that importing takes where the files are in memory.
IMPORTING = 5.0
#: Times that of tracing: both visit every operator of the model (deit_tiny, vit_s14, swin_micro: docs/speed.md).
TRACES = {CONVERT: 1.0, EXPORT: 4.0, FLOAT: 2.6}
#: Seconds of tracing for each module of the model, on the machine of docs/speed.md.
PER_MODULE = 0.008

Result = TypeVar("Result")


def calls(function: Callable[..., Result], show: Show, phase: str, total: int) -> Callable[..., Result]:
    """Return a function that shows how many times it was called, an image each."""
    count = itertools.count(1)

    def shown(*arguments: Any) -> Result:
        show(UnderWay(phase, next(count), total))
        return function(*arguments)

    return shown


class Phases:
    """`with phases(EXPORT): ...` shows a phase while it lasts; `phases.show` is told what is done of it.

    A phase in another one is shown in its place.

    shown: False for nothing at all. console: where it is shown. seconds: name -> seconds, of those that are over.
    """

    def __init__(self, console: Console, *, shown: bool = True, every: float | None = None) -> None:
        self._display = Display(console, every) if shown else None
        self.show: Show = show_nothing if self._display is None else self._display
        self.drawn = shown and console.is_terminal
        self.seconds: dict[str, float] = {}
        self._open = 0

    @contextmanager
    def __call__(self, phase: str, expected: float = 0.0, *, drawn: bool = True) -> Iterator[None]:
        """Show a phase; drawn=False: not in a terminal, where something else shows how far it is.

        expected: seconds, if they are known; else those of earlier phases tell, as far as they can.
        """
        started = time.perf_counter()
        display = self._display if not self._open and (drawn or not self.drawn) else None
        expected = expected or TRACES.get(phase, 0.0) * self.seconds.get(TRACE, 0.0)
        self.show(UnderWay(phase, expected=expected))
        self._open += 1
        try:
            with nullcontext() if display is None else display:
                yield
        finally:
            self._open -= 1
            taken = time.perf_counter() - started
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + taken, 3)
