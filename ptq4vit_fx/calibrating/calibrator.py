"""`calibrate`: images in, a Calibration out. Capture in groups that fit into memory, then search op by op."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.batches import Inputs, batches_for
from ptq4vit_fx.calibrating.capture import Captured, capture, captured_product
from ptq4vit_fx.calibrating.losses import Loss, get_loss
from ptq4vit_fx.calibrating.memory import MemoryBudget, default_memory_limit
from ptq4vit_fx.calibration import Calibration, SearchResult, fingerprint_tensors
from ptq4vit_fx.errors import failure
from ptq4vit_fx.files import check_writable
from ptq4vit_fx.metrics import get_metric
from ptq4vit_fx.names import site
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.search.search_op import search_op

#: What a checkpoint must share with the calibration that resumes it.
IDENTITY = ("images_fingerprint", "weights_fingerprint", "seed", "loss", "sequential")


#: So many products are searched at the same time on a GPU, where most of the time goes into calls.
GPU_SEARCHES = 2


@dataclass(frozen=True)
class CalibrationOptions:
    """The arguments of `ptq4vit_fx.calibrate`, which documents them."""

    seed: int
    progress: bool
    device: torch.device | str | None
    search_device: torch.device | str | None
    loss: str | Loss
    memory_limit: int | None
    checkpoint: str | os.PathLike[str] | None
    sequential: bool


@dataclass
class _Run:
    """A calibration in progress."""

    plan: QuantPlan
    options: CalibrationOptions
    results: Calibration
    seconds: dict[str, float] = field(default_factory=lambda: {"capture": 0.0, "search": 0.0})

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def add(self, op: QuantOp, result: SearchResult, seconds: float) -> None:
        self.results = self.results.with_result(op.name, result, seconds)
        if self.options.checkpoint is not None:
            self.results.save(self.options.checkpoint)


def run_calibration(prepared: GraphModule, data: Tensor | Iterable[Any], options: CalibrationOptions) -> Calibration:
    """Do the work of `ptq4vit_fx.calibrate`; the graph does not change."""
    started = time.perf_counter()
    home = next((p.device for p in prepared.parameters()), torch.device("cpu"))
    device = torch.device(options.device) if options.device is not None else home
    batches = batches_for(prepared, data, "calibrate")
    run = _start(prepared, batches, options, device)
    left = [op for op in run.plan.ops if op.name not in run.results.distances]
    limit = default_memory_limit(device) if options.memory_limit is None else options.memory_limit
    budget = MemoryBudget.of(prepared, limit)
    images = sum(len(batch[0]) for batch in batches)
    searched_on = torch.device(options.search_device or device)
    threads = torch.get_num_threads() if searched_on.type == "cpu" else GPU_SEARCHES
    searches = budget.searches(left, images, threads)
    groups = [[op] for op in left] if options.sequential else budget.groups(left, images, searches)
    batches = budget.split(batches)
    bar = Progress(
        TextColumn("calibrate {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("products,"),
        TimeRemainingColumn(),
        disable=not options.progress,
    )
    prepared.to(device)
    # cuDNN would round the inputs of a convolution to 10 bits; its gradients decide what all other products are worth
    exact = torch.backends.cudnn.flags(torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False)
    try:
        with bar, exact:
            task = bar.add_task("capture", total=len(run.plan.ops), completed=len(run.plan.ops) - len(left))
            for group in groups:
                bar.update(task, description="capture operands and gradients")
                with run.timed("capture"):
                    captured = _capture(prepared, run, group, _on(device, batches))
                bar.update(task, description=group[0].name)
                with run.timed("search"):
                    for op in _search_all(run, group, captured, searched_on, home, searches):
                        bar.update(task, description=op.name, advance=1)
    finally:
        prepared.to(home)
    seconds = {"seconds": round(time.perf_counter() - started, 3)}
    seconds |= {f"{name}_seconds": round(value, 3) for name, value in run.seconds.items()}
    return run.results.with_provenance(seconds | {"capture_groups": len(groups)})


def _start(prepared: GraphModule, batches: list[Inputs], options: CalibrationOptions, device: torch.device) -> _Run:
    """Return an empty run, or the one that the checkpoint holds; raises PTQError if that is of something else."""
    plan = plan_of(prepared)
    loss = options.loss if isinstance(options.loss, str) else getattr(options.loss, "__qualname__", "custom")
    provenance = {
        "images": sum(len(batch[0]) for batch in batches),
        "images_fingerprint": fingerprint_tensors(x for batch in batches for x in batch),
        "weights_fingerprint": fingerprint_tensors(prepared.state_dict().values()),
        "seed": options.seed,
        "loss": loss,
        "sequential": options.sequential,
        "device": str(device),
        "torch": torch.__version__,
    }
    run = _Run(plan, options, Calibration(plan, {}, provenance=provenance))
    if options.checkpoint is None:
        return run
    path = check_writable(options.checkpoint, "calibrate checkpoint=")
    if path.exists():
        saved = Calibration.load(path)
        mine, theirs = (_identity(calibration) for calibration in (run.results, saved))
        other = [key for key in mine if mine[key] != theirs[key]]
        if other:
            raise failure(
                "calibrate",
                f"checkpoint {path}",
                expected="a checkpoint of this plan, these weights, images and arguments",
                got=f"another {' and '.join(other).replace('_fingerprint', '')}",
                do="choose another path or delete the file",
            )
        run.results = saved
    return run


def _on(device: torch.device, batches: Iterable[Inputs]) -> Iterator[Inputs]:
    return (tuple(x.to(device) for x in batch) for batch in batches)


def _identity(calibration: Calibration) -> dict[str, Any]:
    return {"plan": calibration.plan} | {key: calibration.provenance.get(key) for key in IDENTITY}


def _capture(prepared: GraphModule, run: _Run, group: list[QuantOp], batches: Iterable[Inputs]) -> dict[str, Captured]:
    return capture(
        prepared,
        group,
        batches,
        loss=get_loss(run.options.loss, run.options.seed),
        with_gradient=any(get_metric(run.plan.searches[op.name].metric).weighted_by_gradient for op in group),
        quantized=run.results if run.options.sequential else None,
    )


def _search_all(
    run: _Run,
    ops: list[QuantOp],
    captured: dict[str, Captured],
    device: torch.device,
    home: torch.device,
    searches: int,
) -> Iterator[QuantOp]:
    """Search products, so many at the same time, and yield each when it is done.

    On a CPU every search has one thread: its operations are small, and threads of their own keep the cores busier than
    threads within them. It also makes the result independent of how many run beside it.
    """
    threads = torch.get_num_threads()
    single = partial(torch.set_num_threads, 1) if device.type == "cpu" else None
    pool = ThreadPoolExecutor(searches, "search", initializer=single)
    waiting = {pool.submit(_search, run, op, captured, device, home): op for op in ops}
    try:
        for done in as_completed(list(waiting)):
            run.add(waiting[done], *done.result())
            yield waiting.pop(done)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        for future, op in waiting.items():  # after Ctrl-C: what was being searched is done by now
            if not future.cancelled() and future.exception() is None:
                run.add(op, *future.result())


def _search(
    run: _Run, op: QuantOp, captured: dict[str, Captured], device: torch.device, home: torch.device
) -> tuple[SearchResult, float]:
    """Search one product on `device`; return its parameters on `home`, beside the model, and the seconds it took."""
    started = time.perf_counter()
    product = captured_product(op, captured.pop(op.name)).to(device)
    op_seed = (run.options.seed * 1_000_003 + zlib.crc32(op.name.encode())) % 2**63
    lhs, rhs = (run.plan.quantizers[site(op.name, operand)] for operand in ("lhs", "rhs"))
    result = search_op(op, product, lhs, rhs, run.plan.searches[op.name], seed=op_seed)
    result = replace(result, lhs=result.lhs.to(home), rhs=result.rhs.to(home))
    return result, time.perf_counter() - started
