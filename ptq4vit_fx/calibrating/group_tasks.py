"""Calibration past one machine: groups of products as tasks of an executor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import torch

from ptq4vit_fx.calibrating.dispatch import answers, check_executor, instructions
from ptq4vit_fx.calibrating.group_search import Plans, Results, Setting, capture_group, search_group
from ptq4vit_fx.calibrating.memory import MemoryBudget, default_memory_limit, searches_at_once
from ptq4vit_fx.calibrating.options import CalibrationOptions
from ptq4vit_fx.calibrating.worker_state import write_state
from ptq4vit_fx.errors import failure, some_names, warn
from ptq4vit_fx.files import scratch
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.torch_state import computing_with, intra_op_threads

#: Groups that products are cut into where nobody says how many: each costs a forward and a part of a backward of all
#: images, and two to four per worker leave none idle for long (docs/distributed.md).
GROUPS = 8
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shared:
    """What every worker has. threads: that a forward and backward use, on which the last bits of a sum depend."""

    setting: Setting
    memory_limit: int | None
    threads: int


@dataclass(frozen=True)
class GroupAnswer:
    """What was found of a group, how often images were captured for it, and the seconds of both parts of the work."""

    found: dict[str, Results]
    captures: int
    capture_seconds: float
    search_seconds: float


@dataclass(frozen=True)
class GroupTask:
    """Search these products, each by its plans, as far as the memory of the worker allows at a time."""

    wanted: tuple[tuple[QuantOp, Plans], ...]

    def __str__(self) -> str:
        return some_names(op.name for op, _ in self.wanted)

    def __call__(self, shared: Shared) -> GroupAnswer:
        """Run on a worker; raises PTQError where memory_limit does not hold a product."""
        setting, chosen = shared.setting, shared.memory_limit is not None
        ops, images = [op for op, _ in self.wanted], sum(len(batch[0]) for batch in setting.batches)
        limit = shared.memory_limit or default_memory_limit(setting.devices.model)
        budget = MemoryBudget.of(setting.observed, limit, chosen=chosen)
        searches = budget.searches(ops, images, searches_at_once(setting.devices.search))
        groups = budget.groups(ops, images, searches)
        plans, found = dict(self.wanted), dict[str, Results]()
        setting.observed.to(setting.devices.model)
        seconds = [0.0, 0.0]
        for group in groups:
            started = time.perf_counter()
            with computing_with(shared.threads):
                captured = capture_group(setting, group, _on_device(setting))
            seconds[0] += time.perf_counter() - started
            wanted = {op: plans[op] for op in group}
            for _ in search_group(setting, wanted, captured, searches, lambda op, own: found.update({op.name: own})):
                pass
            seconds[1] += time.perf_counter() - started
        return GroupAnswer(found, len(groups), seconds[0], seconds[1] - seconds[0])


def _on_device(setting: Setting) -> Iterator[Inputs]:
    return (tuple(x.to(setting.devices.model) for x in batch) for batch in setting.batches)


@dataclass
class Tally:
    """What the work of all workers came to: captures, their seconds, those of searches; bytes of the state."""

    captures: int = 0
    capture_seconds: float = 0.0
    search_seconds: float = 0.0
    state_bytes: int = 0
    workers: tuple[str, ...] = ()

    def add(self, answer: GroupAnswer, worker: str) -> None:
        """Count the answer of one worker."""
        self.captures += answer.captures
        self.capture_seconds += answer.capture_seconds
        self.search_seconds += answer.search_seconds
        self.workers = tuple(dict.fromkeys((*self.workers, worker)))

    def facts(self) -> dict[str, Any]:
        """Return them for the provenance of a calibration; seconds are summed over workers."""
        seconds = {"capture_seconds": round(self.capture_seconds, 3), "search_seconds": round(self.search_seconds, 3)}
        return seconds | {
            "capture_groups": self.captures,
            "workers": len(self.workers),
            "state_bytes": self.state_bytes,
        }


def check_work(options: CalibrationOptions) -> None:
    """Raise PTQError on an executor that is none, on what it cannot share, and on a number of groups without one."""
    check_executor(options.executor, "calibrate")
    groups = options.groups
    if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int) or groups < 1):
        do = "leave it out for 8"
        raise failure("calibrate", "groups", expected="an integer of 1 or more", got=repr(groups), do=do)
    if options.executor is None and groups is not None:
        do = "leave it out: here the memory decides"
        raise failure("calibrate", "groups", expected="executor= beside it", got="none", do=do)
    if options.executor is not None and options.sequential:
        do = "leave one of them out"
        got = "sequential=True, where each product waits for those before it"
        raise failure("calibrate", "executor", expected="products that can be searched apart", got=got, do=do)


def search_elsewhere(
    setting: Setting,
    wanted: Mapping[QuantOp, Plans],
    executor: Executor,
    memory_limit: int | None,
    groups: int | None,
    tally: Tally,
) -> Iterator[dict[str, Results]]:
    """Yield what was found of each group of products, as they come; tally counts what it took.

    setting: on any device; results are on the CPU. memory_limit: of each worker, None for half of what is free there.
    Warns (PTQWarning) where a worker computes with other instructions than this machine. Raises PTQError as `answers`.
    """
    tasks = [
        GroupTask(tuple((op, wanted[op]) for op in group))
        for group in cut(list(wanted), setting.plan.multiplications, groups or GROUPS)
    ]
    size = sum(x.nbytes for x in (*setting.observed.state_dict().values(), *sum(setting.batches, ())))
    devices = replace(setting.devices, home=CPU)
    setting = replace(setting, batches=_alone(setting.batches), devices=devices)
    shared = Shared(setting, memory_limit, intra_op_threads())
    with scratch("calibrate", size) as folder:
        file = write_state(shared, folder / "state.pt", "calibrate")
        tally.state_bytes = file.size
        strange: dict[str, str] = {}
        for answer in answers(executor, file, tasks, "calibrate"):
            tally.add(answer.value, answer.worker)
            if devices.model.type == "cpu" and answer.instructions != instructions():
                strange[answer.worker] = answer.instructions
            yield answer.value.found
    if strange:
        name, theirs = next(iter(strange.items()))
        warn(
            f"calibrate: executor: {len(strange)} of {len(tally.workers)} workers, such as {name}, compute with "
            f"{theirs}, this machine with {instructions()}: last bits of their sums may differ"
        )


def cut(ops: Sequence[QuantOp], costs: Mapping[str, int], count: int) -> list[list[QuantOp]]:
    """Cut products, in their order, into at most `count` groups that cost about the same.

    costs: of each product, its multiplications. In order, because a backward ends at the first product of a group.
    """
    total = sum(costs.get(op.name, 0) + 1 for op in ops)
    groups: list[list[QuantOp]] = [[] for _ in range(count)]
    done = 0.0
    for op in ops:
        own = costs.get(op.name, 0) + 1
        groups[min(count - 1, int((done + own / 2) * count / total))].append(op)
        done += own
    return [group for group in groups if group]


def _alone(batches: list[Inputs]) -> list[Inputs]:
    """Return batches that share no storage with more than themselves: torch.save would write all of it."""
    total = sum(x.nbytes for batch in batches for x in batch)
    return [tuple(x.clone() if x.untyped_storage().nbytes() > total else x for x in batch) for batch in batches]
