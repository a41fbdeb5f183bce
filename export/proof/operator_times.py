"""How long each operator of a file takes in ONNX Runtime on this machine, by the runtime's own profile."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptq4vit_fx.export.model_files import load_file, unreadable
from ptq4vit_fx.export.proof.latency import Opened
from ptq4vit_fx.export.proof.outputs import fixed_batch, run
from ptq4vit_fx.export.proof.runtime import open_model, quiet_options
from ptq4vit_fx.files import scratch

OPERATION = "time operators"
RUNS = 10
#: Bytes that the profile of so many runs of a large model takes.
PROFILE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class OperatorTimes:
    """Operator of the optimized graph -> milliseconds per run, all its nodes together, those that take most first.

    Each is the median of `runs` runs, of so many images each.
    """

    milliseconds: dict[str, float]
    images: int
    runs: int

    @property
    def total(self) -> float:
        """Milliseconds of all operators."""
        return sum(self.milliseconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Return every number, JSON-ready."""
        return asdict(self) | {"total": self.total}


def operator_times(
    file: str | os.PathLike[str], *, images: int = 1, threads: int = 0, runs: int = RUNS
) -> OperatorTimes:
    """Run a file, as it is, on random inputs and read the runtime's profile; a first run, which allocates, is left out.

    images: at a time; of a file of a fixed batch it is that. Raises PTQError on files that cannot be read or run.
    """
    path, model = os.fspath(file), load_file(file)
    with scratch(OPERATION, PROFILE_BYTES) as folder:
        options = quiet_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        with unreadable(OPERATION, path, "a model that ONNX Runtime opens"):
            session = open_model(model, options=options)
        opened = Opened(path, session, fixed_batch(OPERATION, path, session))
        count = opened.fixed or images
        feed = opened.random(count)
        for _ in range(runs + 1):
            run(OPERATION, path, session, feed)
        profile = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    each = _per_run(profile)[1:]
    median = {name: statistics.median(one.get(name, 0.0) for one in each) for name in {n for one in each for n in one}}
    return OperatorTimes(dict(sorted(median.items(), key=lambda entry: -entry[1])), count, len(each))


def _per_run(profile: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return operator -> milliseconds of each run: the runtime writes down a run behind its nodes."""
    found, current = [], defaultdict[str, float](float)
    for event in profile:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            current[event["args"]["op_name"]] += event["dur"] / 1000
        elif event.get("name") == "model_run":
            found.append(dict(current))
            current.clear()
    return found
