"""Calibration on the workers of an executor: the same bits, with any number of them, in any order, whoever dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import ptq4vit_fx as ptq
from ptq4vit_fx.calibrating import worker_state
from ptq4vit_fx.calibrating.dispatch import TRIES, answers
from ptq4vit_fx.calibrating.group_tasks import cut
from ptq4vit_fx.calibrating.memory import RESERVED
from ptq4vit_fx.calibrating.worker_state import write_state
from ptq4vit_fx.errors import reason_of

#: A memory_limit that is just enough for the small ViT.
LITTLE = RESERVED + (7 << 20) // 5
QUICK = ptq.recipes.best().with_search(n=4, rounds=1)
pytestmark = pytest.mark.filterwarnings("ignore:calibrate. data. 12 images")


def processes_of(count: int, initializer: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=initializer)


@pytest.fixture(scope="module")
def processes():
    with processes_of(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def prepared(small_vit, small_images):
    return ptq.prepare_fx(small_vit, QUICK, small_images[:1])


@pytest.fixture(scope="module")
def here(prepared, small_images):
    return ptq.calibrate(prepared, small_images, progress=False)


def test_two_processes_find_the_same_bits(prepared, here, small_images, processes, tmp_path):
    checkpoint, seen = tmp_path / "scales.safetensors", list[Any]()
    found = ptq.calibrate(
        prepared, small_images, executor=processes, groups=4, checkpoint=checkpoint, progress=seen.append
    )
    assert found.fingerprint() == here.fingerprint() == ptq.Calibration.load(checkpoint).fingerprint()
    assert found.distances == here.distances
    assert found.snr == here.snr
    assert found.provenance["capture_groups"] == 4
    assert 1 <= found.provenance["workers"] <= 2
    assert [moment.done for moment in seen if moment.phase == "search and round"][-1] == len(prepared.plan.ops)


def test_threads_and_any_number_of_groups_find_the_same_bits(prepared, here, small_images):
    for groups in (1, 100):
        with ThreadPoolExecutor(2) as pool:
            found = ptq.calibrate(prepared, small_images, executor=pool, groups=groups, progress=False)
        assert found.fingerprint() == here.fingerprint()
        assert found.provenance["capture_groups"] == min(groups, len(prepared.plan.ops))


def test_a_worker_cuts_its_group_by_its_own_memory(prepared, small_images):
    with ThreadPoolExecutor(1) as pool:
        found = ptq.calibrate(prepared, small_images, executor=pool, groups=1, memory_limit=LITTLE, progress=False)
    alone = ptq.calibrate(prepared, small_images, memory_limit=LITTLE, progress=False)  # the same batches
    assert found.fingerprint() == alone.fingerprint()
    assert found.provenance["capture_groups"] > 1
    with ThreadPoolExecutor(1) as pool, pytest.raises(ptq.PTQError, match=r"^calibrate: memory_limit: .* or more"):
        ptq.calibrate(prepared, small_images, executor=pool, memory_limit="150MiB", progress=False)


def test_sensitivity_is_the_same_on_workers(prepared, small_images):
    held_out = torch.randn(20, *small_images.shape[1:], generator=torch.Generator().manual_seed(2))
    tables = []
    with ThreadPoolExecutor(2) as pool:
        for where in ({}, {"executor": pool, "groups": 3}):
            arguments: dict[str, Any] = {"held_out": held_out, "forms": ["w8a8", "w4a8"], "progress": False, **where}
            tables.append(ptq.sensitivity(prepared, small_images, **arguments))
    here, there = tables
    assert there.costs == here.costs
    assert any(cost.measured is not None for cost in here.costs)
    assert there.passes == pytest.approx(here.passes)


def far_away() -> None:
    """Make of this process a worker of another machine, which does not see the files of the client."""
    setattr(worker_state, "not_a_file", lambda path: "no such file")  # noqa: B010 - to mypy it is another module's


def test_workers_that_cannot_read_the_file_get_its_bytes(prepared, here, small_images):
    with processes_of(2, far_away) as pool:
        found = ptq.calibrate(prepared, small_images, executor=pool, groups=6, progress=False)
    assert found.fingerprint() == here.fingerprint()


def test_what_was_found_before_the_pool_broke_is_kept(prepared, here, small_images, processes, tmp_path):
    checkpoint = tmp_path / "scales.safetensors"
    before = set(multiprocessing.active_children())

    def kill(moment: Any) -> None:
        if moment.phase == "search and round" and moment.done:
            for process in set(multiprocessing.active_children()) - before:
                os.kill(process.pid or 0, signal.SIGKILL)

    with (
        processes_of(1) as pool,
        pytest.raises(ptq.PTQError, match=r"^calibrate: executor: .*BrokenProcessPool.*checkpoint="),
    ):
        ptq.calibrate(prepared, small_images, executor=pool, groups=4, checkpoint=checkpoint, progress=kill)
    kept = ptq.Calibration.load(checkpoint)
    assert 0 < len(kept.distances) < len(prepared.plan.ops)
    found = ptq.calibrate(prepared, small_images, executor=processes, checkpoint=checkpoint, progress=False)
    assert found.fingerprint() == here.fingerprint()
    assert kept.seconds.items() <= found.seconds.items()  # not searched again
    again = ptq.calibrate(prepared, small_images, executor=processes, checkpoint=checkpoint, progress=False)
    assert again.provenance["capture_groups"] == again.provenance["workers"] == 0


def test_the_reason_of_a_workers_error_is_no_traceback(processes):
    with pytest.raises(ValueError, match="invalid literal") as caught:
        processes.submit(int, "x").result()
    assert reason_of(caught.value) == "ValueError: invalid literal for int() with base 10: 'x'"


@dataclass(frozen=True)
class Fails:
    """A task that fails so many times, which it counts in a folder, and then answers with the state."""

    times: int
    folder: Path

    def __str__(self) -> str:
        return "this task"

    def __call__(self, state: str) -> str:
        tried = len(list(self.folder.iterdir()))
        (self.folder / f"{tried}").touch()
        if tried < self.times:
            raise MemoryError("no room on this worker")
        return state


def test_a_task_that_failed_is_tried_elsewhere(tmp_path):
    file, folder = write_state("shared", tmp_path / "state.pt", "calibrate"), tmp_path / "tries"
    folder.mkdir()
    with ThreadPoolExecutor(1) as pool:
        assert [answer.value for answer in answers(pool, file, [Fails(TRIES - 1, folder)], "calibrate")] == ["shared"]
        for old in folder.iterdir():
            old.unlink()
        with pytest.raises(ptq.PTQError, match=r"^calibrate: this task: .* 3 tried, got MemoryError: no room"):
            list(answers(pool, file, [Fails(TRIES, folder)], "calibrate"))


def test_a_file_that_is_not_what_the_client_wrote_is_not_read(tmp_path):
    file = write_state("of this test", tmp_path / "state.pt", "calibrate")
    content = file.content()
    (tmp_path / "state.pt").write_bytes(content[:-1] + b"x")
    assert worker_state.state_of(file, None, "calibrate") is None
    assert worker_state.state_of(file, content, "calibrate") == "of this test"


def test_groups_are_cut_in_order_into_equal_costs(prepared):
    ops = prepared.plan.ops
    costs = prepared.plan.multiplications
    groups = cut(ops, costs, 3)
    assert [op for group in groups for op in group] == list(ops)
    shares = [sum(costs[op.name] for op in group) / sum(costs.values()) for group in groups]
    assert len(groups) == 3
    assert max(shares) < 0.5
    assert len(cut(ops, {}, 1000)) == len(ops)


def test_what_cannot_be_done_elsewhere_is_one_sentence(prepared, small_images, processes):
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"executor": 3}, r"executor: expected a concurrent\.futures\.Executor, got int; pass"),
        ({"executor": processes, "groups": 0}, r"groups: expected an integer of 1 or more, got 0; "),
        ({"groups": 4}, r"groups: expected executor= beside it, got none; "),
        ({"executor": processes, "sequential": True}, r"executor: expected products that can be searched apart, got "),
        ({"executor": processes, "loss": lambda output: output.sum()}, r"executor: expected a model and a loss that "),
        ({"executor": closed}, r"executor: expected one that takes tasks, got RuntimeError: "),
    ]
    for arguments, said in cases:
        with pytest.raises(ptq.PTQError, match=f"^calibrate: {said}"):
            ptq.calibrate(prepared, small_images, progress=False, **arguments)


def test_a_worker_with_another_package_is_named(prepared, small_images):
    with (
        processes_of(1, other_torch) as pool,
        pytest.raises(
            ptq.PTQError, match=r"^calibrate: worker .*:\d+: expected torch .*, as the client has, got 1\.0; install"
        ),
    ):
        ptq.calibrate(prepared, small_images, executor=pool, progress=False)


def other_torch() -> None:
    torch.__version__ = "1.0"  # type: ignore[assignment]


def test_images_of_a_slice_travel_alone(prepared, small_images, here):
    many = torch.cat([small_images, torch.randn(2000, *small_images.shape[1:])])
    with ThreadPoolExecutor(1) as pool:
        found = ptq.calibrate(prepared, many[: len(small_images)], executor=pool, groups=1, progress=False)
    assert found.fingerprint() == here.fingerprint()
    assert found.provenance["state_bytes"] < many.nbytes
