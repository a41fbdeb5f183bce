"""Tasks on the workers of any `concurrent.futures.Executor`: in any order, and elsewhere where a worker dies."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ptq4vit_fx.calibrating.worker_state import StateFile, state_of, worker_name
from ptq4vit_fx.errors import PTQError, failure, reason_of
from ptq4vit_fx.torch_state import independent_of_caller

#: A task that failed for a reason of its worker's, such as its death, is tried so many times in all.
TRIES = 3
#: What a worker computes, from the state that all share. It is pickled, and must be a function or value of a module.
Task = Callable[[Any], Any]
#: Held while a task runs: several threads of one worker share the model, whose observers record for one of them.
_ALONE = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """What a task gave, the worker that it ran on, and what that computes with: instructions of its CPU."""

    worker: str
    instructions: str
    value: Any


@dataclass(frozen=True)
class Lacking:
    """A worker that has not got the state, and cannot read the file."""

    worker: str


def check_executor(executor: Any, operation: str) -> None:
    """Raise PTQError on what is no executor."""
    if executor is not None and not isinstance(executor, Executor):
        expected, got = "a concurrent.futures.Executor", type(executor).__name__
        do = "pass client.get_executor() of a Dask client, or a ProcessPoolExecutor"
        raise failure(operation, "executor", expected=expected, got=got, do=do)


def instructions() -> str:
    """Return which instructions torch uses on this CPU: others may round the last bit of a sum differently."""
    return torch.backends.cpu.get_cpu_capability()


def work(file: StateFile, content: bytes | None, task: Task, operation: str, attempt: str) -> Answer | Lacking:
    """Run a task on a worker, one at a time in each process.

    content: of the file, for a worker that has answered Lacking. attempt: of no other call, for schedulers that keep
    what was computed of equal arguments.
    """
    with _ALONE, independent_of_caller():
        state = state_of(file, content, operation)
        if state is None:
            return Lacking(worker_name())
        return Answer(worker_name(), instructions(), task(state))


def answers(executor: Executor, file: StateFile, tasks: Sequence[Task], operation: str) -> Iterator[Answer]:
    """Yield the answers of all tasks, as they come.

    Workers read the state from its file. One that cannot, on another machine, says so once, and its next task brings
    the bytes along: no more of them travel at a time than there are such workers. Raises PTQError that a task raised,
    where the executor is broken or shut down, and where a task has failed TRIES times.
    """
    sent, held, lacking = dict[Future[Any], tuple[Task, bool]](), list[Task](), set[str]()
    failed: Counter[int] = Counter()

    def send(task: Task, *, carrying: bool) -> None:
        with _usable(operation):
            content = file.content() if carrying else None
            sent[executor.submit(work, file, content, task, operation, uuid.uuid4().hex)] = (task, carrying)

    try:
        for task in tasks:
            send(task, carrying=False)
        while sent:
            answered = False
            for future in wait(sent, return_when=FIRST_COMPLETED).done:
                task, _ = sent.pop(future)
                answer = _result(future, task, failed, operation)
                if isinstance(answer, Answer):
                    lacking.discard(answer.worker)
                    answered = True
                    yield answer
                    continue
                if isinstance(answer, Lacking):
                    lacking.add(answer.worker)
                held.append(task)
            for _ in range(len(lacking) - sum(carrying for _, carrying in sent.values())):
                if held:
                    send(held.pop(0), carrying=True)
            while held and (answered or not lacking):
                send(held.pop(0), carrying=False)
    finally:
        for future in sent:
            future.cancel()


def _result(future: Future[Any], task: Task, failed: Counter[int], operation: str) -> Answer | Lacking | None:
    """Return what came back, None of a task that is to be tried elsewhere."""
    try:
        with _usable(operation):
            answer: Answer | Lacking = future.result()
    except PTQError:
        raise
    except Exception as error:  # the death of a worker has another type in every library
        failed[id(task)] += 1
        if failed[id(task)] == TRIES:
            expected, do = (
                f"a worker that finishes it, {TRIES} tried",
                "look at the workers' logs: memory, or a machine",
            )
            raise failure(operation, f"{task}", expected=expected, got=reason_of(error), do=do) from error
        return None
    return answer


@contextmanager
def _usable(operation: str) -> Iterator[None]:
    """Turn what executors say that take no more tasks into one sentence."""
    try:
        yield
    except (BrokenExecutor, RuntimeError) as error:
        if not isinstance(error, BrokenExecutor) and "shutdown" not in str(error):
            raise
        expected, got = "one that takes tasks", reason_of(error)
        do = "make a new one and call again: with checkpoint= what was found is kept"
        raise failure(operation, "executor", expected=expected, got=got, do=do) from error
