"""What is under way: how far, and how long it will take. A bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.text import Text

from ptq4vit_fx.errors import printable

#: Seconds between two lines where there is no terminal.
EVERY = 30.0
Batch = TypeVar("Batch", bound=Sequence[Any])


@dataclass(frozen=True)
class UnderWay:
    """A phase in words, and `done` of `total` units of it; total 0 where nothing is counted.

    detail: what of it is done right now. expected: seconds that it will take, 0 where nobody knows.
    """

    phase: str
    done: int = 0
    total: int = 0
    unit: str = "images"
    detail: str = ""
    expected: float = 0.0

    def left(self, seconds: float, first: int = 0) -> float | None:
        """Return how many seconds it will go on, after so many; None if that is not known. first: done before them."""
        if self.total and self.done > first:
            return seconds * (self.total - self.done) / (self.done - first)
        return self.expected - seconds if seconds < self.expected else None

    def line(self, seconds: float, first: int = 0) -> str:
        """Return one line that says so, after so many seconds of this phase."""
        count = f": {self.done} of {self.total} {self.unit}" if self.total else ""
        detail = f" ({self.detail})" if self.detail else ""
        left = self.left(seconds, first)
        rest = "" if left is None else f", about {clock(left)} to go"
        return printable(f"{self.phase}{count}, {clock(seconds)}{rest}{detail}")


#: Is called with what is under way whenever that changes.
Show = Callable[[UnderWay], None]


def show_nothing(moment: UnderWay) -> None:
    """Show nothing."""


def clock(seconds: float) -> str:
    """Return seconds as m:ss, or h:mm:ss."""
    whole = round(seconds)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:0{2 if hours else 1}}:{whole % 60:02}"


def counted(batches: Iterable[Batch], show: Show, phase: str, total: int, done: int = 0) -> Iterator[Batch]:
    """Yield batches, each of the inputs of some images, and show how many images are done; done: before these."""
    for batch in batches:
        show(UnderWay(phase, done, total))
        yield batch
        done += len(batch[0])
    show(UnderWay(phase, done, total))


class Display:
    """Draws what is under way into a terminal, or prints it as a line every `every` seconds, EVERY by default.

    It does so inside of `with`, and leaves nothing of what it has drawn.
    """

    def __init__(self, console: Console, every: float | None = None) -> None:
        self._console, self._every = console, every or EVERY
        self._moment, self._started, self._first = UnderWay(""), time.monotonic(), 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Display:
        self._closed.clear()
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                BarColumn(12),
                _Line(self),
                console=self._console,
                transient=True,
                redirect_stdout=False,  # else results would go to standard error
                redirect_stderr=False,
            )
            self._bar.add_task("", total=None)
            self._bar.start()
        else:
            self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._bar is not None:
            self._bar.stop()
        if self._thread is not None:
            self._thread.join()
        self._bar = self._thread = None

    def __call__(self, moment: UnderWay) -> None:
        """Show this from now on."""
        with self._lock:
            if moment.phase != self._moment.phase:
                self._started, self._first = time.monotonic(), moment.done
            self._moment = moment
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=moment.done, total=moment.total or None)

    def line(self) -> str:
        """Return the line of what is under way."""
        with self._lock:
            return self._moment.line(time.monotonic() - self._started, self._first)

    def _beat(self) -> None:
        while not self._closed.wait(self._every):
            self._console.print(self.line(), highlight=False)


@contextmanager
def shown(progress: bool | Show) -> Iterator[Show]:
    """Give what is told how far something is: the caller's function, a bar in a terminal, or nothing."""
    if callable(progress):
        yield progress
        return
    console = Console()
    with Display(console) if progress and console.is_terminal else nullcontext(show_nothing) as show:
        yield show


class _Line(ProgressColumn):
    """The line of what is under way, with the seconds of right now."""

    max_refresh = 0.5

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def render(self, task: Task) -> Text:
        return Text(self._display.line(), no_wrap=True, overflow="ellipsis")
