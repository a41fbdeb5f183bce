"""How long files take on this machine, run in turn: the one way in which this package times a file."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.model_files import load_file, unreadable
from ptq4vit_fx.export.proof.outputs import fixed_batch, run
from ptq4vit_fx.export.proof.runtime import in_turn_options, open_model

OPERATION = "measure"
#: Rounds that are measured, at least and at most; between the two, SECONDS of each file decide.
FEWEST, MOST, SECONDS = 5, 50, 1.0
#: ONNX Runtime's spelling of the types of inputs that are measured.
TYPES = {
    "tensor(float)": np.float32,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
}
Array = NDArray[Any]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and their quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return that of two numbers or more."""
        low, median, high = statistics.quantiles(values, n=4)
        return Spread(median, low, high)


@dataclass(frozen=True)
class InTurn(Generic[Name]):
    """Milliseconds of each run, round by round: every round ran each once, so that a slow moment hit all of them."""

    milliseconds: Mapping[Name, Sequence[float]]

    @property
    def rounds(self) -> int:
        return min(map(len, self.milliseconds.values()))

    def spread(self, name: Name) -> Spread:
        """Return the milliseconds of a run."""
        return Spread.of(self.milliseconds[name])

    def ratio(self, slow: Name, fast: Name) -> Spread:
        """Return how many times longer one run takes than another, of the ratios of each round."""
        pairs = zip(self.milliseconds[slow], self.milliseconds[fast], strict=True)
        return Spread.of([one / other for one, other in pairs])


def in_turn(
    runs: Mapping[Name, Callable[[], Any]],
    *,
    rounds: int | None = None,
    seconds: float = SECONDS,
    show: Callable[[int, int], None] | None = None,
) -> InTurn[Name]:
    """Run each once per round, after a round that does not count, in which each allocates.

    rounds: so many, 2 or more; None: FEWEST to MOST, as long as `seconds` of each run last. show: is called with the
    number of the round and that of all rounds, as far as it is known.
    """
    for execute in runs.values():
        execute()
    taken: dict[Name, list[float]] = {name: [] for name in runs}
    least, most = (FEWEST, MOST) if rounds is None else (rounds, rounds)
    until = time.perf_counter() + seconds * len(runs)
    for number in range(most):
        if number >= least and time.perf_counter() > until:
            break
        for name, execute in runs.items():
            started = time.perf_counter()
            execute()
            taken[name].append(1000 * (time.perf_counter() - started))
        if show is not None:
            show(number + 1, most)
    return InTurn(taken)


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a run of a file and of its float file; ratio: float's over the file's, median of rounds.

    low, high: quartiles of that ratio. images: at a time. threads: of each, 0 where the runtime chose.
    """

    milliseconds: float
    float_milliseconds: float
    ratio: float
    low: float
    high: float
    images: int
    rounds: int
    threads: int = 0

    def __str__(self) -> str:
        images = "one image" if self.images == 1 else f"{self.images} images"
        mine, theirs = (f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in (self.milliseconds, self.float_milliseconds))
        times = f"{mine} ms, float {theirs}"
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f}) times float here: {images} {times}"

    def to_dict(self) -> dict[str, Any]:
        """Return every number, JSON-ready."""
        return asdict(self)


def measure_latency(
    file: str | os.PathLike[str],
    float_file: str | os.PathLike[str],
    *,
    images: int = 1,
    threads: int = 0,
    seconds: float = SECONDS,
) -> Latency:
    """Run both files in turn on random inputs, as ONNX Runtime's CPU provider does by default; return what it took.

    images: at a time; of a file of a fixed batch it is that. Raises PTQError on files that cannot be read or run, and
    on inputs whose sizes they do not say.
    """
    opened = [Opened.of(os.fspath(path), threads) for path in (file, float_file)]
    count = next((one.fixed for one in opened if one.fixed is not None), images)
    mine, theirs = (one.runs(count) for one in opened)
    found = in_turn({"file": mine, "float": theirs}, seconds=seconds)
    ratio = found.ratio("float", "file")
    medians = [found.spread(name).median for name in ("file", "float")]
    return Latency(medians[0], medians[1], ratio.median, ratio.low, ratio.high, count, found.rounds, threads)


@dataclass(frozen=True)
class Opened:
    """A file in ONNX Runtime, as it is; fixed: the only number of images that it takes, None if it takes any."""

    path: str
    session: InferenceSession
    fixed: int | None

    @staticmethod
    def of(path: str, threads: int = 0) -> Opened:
        """Open a file with threads that sleep while another one runs: else that has a core less.

        threads: 0 lets the runtime choose. Raises PTQError on a file that cannot be read or that the runtime refuses.
        """
        model = load_file(path)
        with unreadable(OPERATION, path, "a model that ONNX Runtime opens"):
            session = open_model(model, options=in_turn_options(threads))
        return Opened(path, session, fixed_batch(OPERATION, path, session))

    def runs(self, images: int) -> Callable[[], Any]:
        """Return what runs the file on so many random images; raises PTQError if it does not say their sizes."""
        feed = self.random(images)
        return lambda: run(OPERATION, self.path, self.session, feed)

    def random(self, images: int) -> list[Array]:
        """Return inputs of the file: images between -1 and 1, integers 0 to 255 where it takes bytes, else 0."""
        generator = np.random.default_rng(0)
        feed = []
        for entry in self.session.get_inputs():
            shape = [images, *entry.shape[1:]]
            if entry.type not in TYPES or not all(isinstance(size, int) for size in shape):
                expected, do = "an input of a known type and sizes", "export it again with fixed image sizes"
                subject = f"{self.path}: {entry.name}"
                raise failure(OPERATION, subject, expected=expected, got=f"{entry.type} {shape}", do=do)
            kind = np.dtype(TYPES[entry.type])
            values = generator.uniform(-1, 1, shape) if kind.kind == "f" else generator.integers(0, 256, shape)
            feed.append((values * (kind != np.int64)).astype(kind))
        return feed
