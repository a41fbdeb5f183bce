"""Torch's global state: every entry point computes the same whatever its caller has switched on, and leaves it so.

Some of it (grad mode, autocast, the default device) belongs to a thread. The rest belongs to the process: threads that
need it otherwise hold it together.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch

#: Devices that autocast is switched on for.
AUTOCAST = ("cpu", "cuda")


def held_together(setting: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Make of a setting of the whole process one that several threads may hold.

    The first of them makes it, the last gives back what was before.
    """
    lock, stack, holders = threading.Lock(), contextlib.ExitStack(), 0

    @functools.wraps(setting)
    @contextlib.contextmanager
    def hold() -> Iterator[None]:
        nonlocal holders
        with lock:
            if not holders:
                stack.enter_context(setting())
            holders += 1
        try:
            yield
        finally:
            with lock:
                holders -= 1
                if not holders:
                    stack.close()

    return hold


@held_together
@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Make tensors float32 where no type is named."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


#: Calls of a tracer, a copy or an exporter for one call of the model's own.
DEEPER = 8


@held_together
@contextlib.contextmanager
def deeper_calls() -> Iterator[None]:
    """Let whoever walks through a model of nested modules go as deep as the model itself does."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(DEEPER * before)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@held_together
@contextlib.contextmanager
def without_fast_attention() -> Iterator[None]:
    """Let nn.MultiheadAttention compute by separate operators: its fast path is one, which nothing can look into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@held_together
@contextlib.contextmanager
def full_precision_convolutions() -> Iterator[None]:
    """Keep cuDNN from rounding the inputs of a convolution to 10 bits, and from choosing among orders of summation.

    The gradients of a patch convolution decide what all other products are worth.
    """
    with torch.backends.cudnn.flags(torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the types that operands have: integer codes above 2048 or 256 are none in float16 or bfloat16."""
    with contextlib.ExitStack() as stack:
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def independent_of_caller() -> Iterator[None]:
    """Compute with gradients where they are asked for, in float32, on the CPU where no device is named.

    A decorator too. What holds around it (no_grad, inference_mode, autocast, a default dtype or device) holds again
    behind it, also after an exception.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_autocast())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(float32_by_default())
        stack.enter_context(deeper_calls())
        stack.enter_context(full_precision_convolutions())  # torch.export gives back what it finds, at its end
        yield


#: Held while the number of threads of the process is another than its user's.
_COUNTING = threading.Lock()


def intra_op_threads() -> int:
    """Return how many threads an operator of torch uses on the CPU."""
    with _COUNTING:
        return torch.get_num_threads()


@contextlib.contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Let operators that this thread calls use so many threads on the CPU, and as many as before behind it."""
    with _COUNTING:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        with _COUNTING:
            torch.set_num_threads(before)


def single_threaded_pool(workers: int, name: str) -> ThreadPoolExecutor:
    """Return a pool whose workers compute with one thread each; nobody else does.

    `torch.set_num_threads` is about its own thread, and about all that ask for the first time later. So the workers all
    start and ask here, and the number is given back before anybody else does.
    """
    pool = ThreadPoolExecutor(workers, name)
    started = threading.Barrier(workers)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()
        started.wait()

    with _COUNTING:
        threads = torch.get_num_threads()
        try:
            for future in [pool.submit(start) for _ in range(workers)]:
                future.result()
        finally:
            torch.set_num_threads(threads)
    return pool
