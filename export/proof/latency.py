"""How long a file takes beside its float file in ONNX Runtime on this machine, in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.model_files import load_file, unreadable
from ptq4vit_fx.export.proof.outputs import fixed_batch, run
from ptq4vit_fx.export.proof.runtime import open_model, quiet_options

OPERATION = "measure"
#: Rounds that are measured, at least and at most; between the two, SECONDS decide.
FEWEST, MOST, SECONDS = 5, 50, 2.0
#: ONNX Runtime's spelling of the types of inputs that are measured.
TYPES = {
    "tensor(float)": np.float32,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
}


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
        times = f"{self.milliseconds:.3g} ms, float {self.float_milliseconds:.3g}"
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

    Every round runs each once, so that a slow moment of the machine hits both. images: at a time; of a file of a fixed
    batch it is that. Raises PTQError on files that cannot be read or run, and on inputs whose sizes they do not say.
    """
    paths = [os.fspath(file), os.fspath(float_file)]
    sessions = [_session(path, threads) for path in paths]
    fixed = [fixed_batch(OPERATION, path, session) for path, session in zip(paths, sessions, strict=True)]
    count = next((size for size in fixed if size is not None), images)
    feeds = [random_inputs(path, session, count) for path, session in zip(paths, sessions, strict=True)]
    runs = list(zip(paths, sessions, feeds, strict=True))
    for path, session, feed in runs:  # the first run of each allocates
        run(OPERATION, path, session, feed)
    taken: list[list[float]] = [[], []]
    until = time.perf_counter() + seconds
    while len(taken[1]) < FEWEST or (len(taken[1]) < MOST and time.perf_counter() < until):
        for side, (path, session, feed) in zip(taken, runs, strict=True):
            started = time.perf_counter()
            run(OPERATION, path, session, feed)
            side.append(1000 * (time.perf_counter() - started))
    ratios = [theirs / mine for mine, theirs in zip(*taken, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    mine, theirs = (statistics.median(side) for side in taken)
    return Latency(mine, theirs, middle, low, high, count, len(ratios), threads)


def _session(path: str, threads: int) -> InferenceSession:
    """Open a file as it is, with threads that sleep while the other file runs: else that has a core less."""
    options = quiet_options(threads)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = load_file(path)
    with unreadable(OPERATION, path, "a model that ONNX Runtime opens"):
        return open_model(model, options=options)


def random_inputs(path: str, session: InferenceSession, images: int) -> Sequence[NDArray[Any]]:
    """Return inputs of a file: images between -1 and 1, integers 0 to 255 where it takes bytes, else 0."""
    generator = np.random.default_rng(0)
    feed = []
    for entry in session.get_inputs():
        shape = [images, *entry.shape[1:]]
        if entry.type not in TYPES or not all(isinstance(size, int) for size in shape):
            expected, do = "an input of a known type and sizes", "export it again with fixed image sizes"
            raise failure(OPERATION, f"{path}: {entry.name}", expected=expected, got=f"{entry.type} {shape}", do=do)
        kind = np.dtype(TYPES[entry.type])
        values = generator.uniform(-1, 1, shape) if kind.kind == "f" else generator.integers(0, 256, shape)
        feed.append((values * (kind != np.int64)).astype(kind))
    return feed
