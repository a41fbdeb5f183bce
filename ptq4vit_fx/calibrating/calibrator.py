"""`calibrate`: images in, a Calibration out. Capture in groups that fit into memory, then search op by op."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule

from ptq4vit_fx.calibrating.capture import Captured, capture, captured_product
from ptq4vit_fx.calibrating.fit import WEIGHTS_FINGERPRINT, check_shapes, weights_fingerprint
from ptq4vit_fx.calibrating.losses import get_loss
from ptq4vit_fx.calibrating.memory import MemoryBudget, default_memory_limit
from ptq4vit_fx.calibrating.options import CalibrationOptions, Devices
from ptq4vit_fx.calibrating.ranges import measure_balances
from ptq4vit_fx.calibration import Calibration, SearchResult, fingerprint_tensors
from ptq4vit_fx.errors import failure, warn
from ptq4vit_fx.files import check_writable
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.inputs.items import model_inputs
from ptq4vit_fx.inputs.plausible import NORMALIZATION, warn_of_implausible
from ptq4vit_fx.inputs.progress import Show, UnderWay, counted, shown
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.names import OPERANDS, site
from ptq4vit_fx.passes.apply_balances import apply_balances
from ptq4vit_fx.passes.graph.contract import plan_of, sharing_tensors
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.search.metrics import get_metric
from ptq4vit_fx.search.products import Product
from ptq4vit_fx.search.search_op import search_op
from ptq4vit_fx.torch_state import intra_op_threads, single_threaded_pool

#: What a checkpoint must share with the calibration that resumes it.
IDENTITY = ("images_fingerprint", WEIGHTS_FINGERPRINT, "seed", "loss", "sequential")

#: So many products are searched at the same time on a GPU, where most of the time goes into calls.
GPU_SEARCHES = 2


def run_calibration(prepared: GraphModule, data: Any, options: CalibrationOptions) -> Calibration:
    """Do the work of `ptq4vit_fx.calibrate`; the graph does not change."""
    started = time.perf_counter()
    devices = Devices.of(prepared, options)
    batches = batches_for(prepared, data, "calibrate", images=options.images, progress=options.progress is True)
    warn_of_implausible(batches, model_inputs(prepared), "calibrate", prepared.meta.get(NORMALIZATION))
    run = _start(prepared, batches, options, devices)
    schedule = _schedule(run, batches)
    with _model_at_work(run), shown(options.progress) as show:
        if run.plan.balances:
            with run.timed("balance"):
                run.balance(schedule.batches, show)
        for group in schedule.groups:
            with run.timed("capture"):
                captured = _capture(run, group, schedule.batches, show)
            with run.timed("search"):
                show(run.searched(group[0]))
                for op in _search_all(run, group, captured, schedule.searches):
                    show(run.searched(op))
    seconds = {"seconds": round(time.perf_counter() - started, 3)}
    seconds |= {f"{name}_seconds": round(value, 3) for name, value in run.seconds.items()}
    for remark in run.results.remarks():
        warn(str(remark))
    return run.results.with_provenance(seconds | {"capture_groups": len(schedule.groups)})


@dataclass
class _Run:
    """A calibration in progress. observed: what is captured, the prepared model or a copy with balanced channels."""

    prepared: GraphModule
    plan: QuantPlan
    options: CalibrationOptions
    devices: Devices
    results: Calibration
    observed: GraphModule
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> list[QuantOp]:
        """The products that have no result yet, or lack one of a further search."""
        further = self.options.further
        return [
            op
            for op in self.plan.ops
            if op.name not in self.results.distances or (further is not None and further.lacks(op))
        ]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def searched(self, op: QuantOp) -> UnderWay:
        """Return how many products are done; op: the one that was or will be."""
        total = len(self.plan.ops)
        return UnderWay("search and round", total - len(self.left), total, "products", op.name)

    def balance(self, batches: list[Inputs], show: Show) -> None:
        """Find the numbers of the plan's balances, if the checkpoint has none, and observe a model that has them."""
        if not self.results.balances:
            on_device = (tuple(x.to(self.devices.model) for x in batch) for batch in batches)
            images = _images(batches)
            seen = counted(on_device, show, "measure ranges of channels", images)
            found = measure_balances(self.prepared, seen, images)
            balances = {key: own.to(self.devices.home) for key, own in found.items()}
            self.results = replace(self.results, balances=balances)
            self.save()
        self.observed = apply_balances(sharing_tensors(self.prepared), self.results.balances)

    def save(self) -> None:
        """Write the checkpoint, if there is one."""
        if self.options.checkpoint is not None:
            self.results.save(self.options.checkpoint)

    def add(self, op: QuantOp, result: SearchResult | None, seconds: float) -> None:
        if result is None:
            return
        self.results = self.results.with_result(op.name, result, seconds)
        self.save()


def _start(prepared: GraphModule, batches: list[Inputs], options: CalibrationOptions, devices: Devices) -> _Run:
    """Return an empty run, or the one that the checkpoint holds; raises PTQError if that is of something else."""
    results = empty_calibration(prepared, batches, options)
    if options.known is not None and _identity(options.known) == _identity(results):
        results = options.known
    if options.checkpoint is not None:
        results = resumed(prepared, results, options.checkpoint)
    return _Run(prepared, plan_of(prepared), options, devices, results, prepared)


def empty_calibration(prepared: GraphModule, batches: list[Inputs], options: CalibrationOptions) -> Calibration:
    """Return a calibration without results, which says what it is going to be of."""
    loss = options.loss if isinstance(options.loss, str) else getattr(options.loss, "__qualname__", "custom")
    provenance = {
        "images": _images(batches),
        "images_fingerprint": fingerprint_tensors(x for batch in batches for x in batch),
        WEIGHTS_FINGERPRINT: weights_fingerprint(prepared),
        "seed": options.seed,
        "loss": loss,
        "sequential": options.sequential,
        "device": str(Devices.of(prepared, options).model),
        "torch": torch.__version__,
    }
    return Calibration(plan_of(prepared), {}, provenance=provenance)


def resumed(prepared: GraphModule, mine: Calibration, checkpoint: str | os.PathLike[str]) -> Calibration:
    """Return what the checkpoint holds, or `mine` if there is none yet; raises PTQError if it is of something else."""
    path = check_writable(checkpoint, "calibrate checkpoint=")
    if not path.exists():
        return mine
    saved = Calibration.load(path)
    theirs = _identity(saved)
    other = [key for key, value in _identity(mine).items() if value != theirs[key]]
    if other:
        raise failure(
            "calibrate",
            f"checkpoint {path}",
            expected="a checkpoint of this plan, these weights, images and arguments",
            got=f"another {' and '.join(other).replace('_fingerprint', '')}",
            do="choose another path or delete the file",
        )
    check_shapes(prepared, saved, f"calibrate: checkpoint {path}")
    return saved


def _identity(calibration: Calibration) -> dict[str, Any]:
    return {"plan": calibration.plan} | {key: calibration.provenance.get(key) for key in IDENTITY}


def _images(batches: Iterable[Inputs]) -> int:
    return sum(len(batch[0]) for batch in batches)


@dataclass(frozen=True)
class _Schedule:
    """What fits into memory: the products that are captured together, the batches, the searches beside each other."""

    groups: list[list[QuantOp]]
    batches: list[Inputs]
    searches: int


def _schedule(run: _Run, batches: list[Inputs]) -> _Schedule:
    options, devices, left, images = run.options, run.devices, run.left, _images(batches)
    limit, chosen = options.memory_limit, options.memory_limit is not None
    limit = default_memory_limit(devices.model) if limit is None else limit
    budget = MemoryBudget.of(run.prepared, limit, chosen=chosen)
    threads = intra_op_threads() if devices.search.type == "cpu" else GPU_SEARCHES
    searches = budget.searches(left, images, threads)
    groups = [[op] for op in left] if options.sequential else budget.groups(left, images, searches)
    return _Schedule(groups, budget.split(batches), searches)


@contextmanager
def _model_at_work(run: _Run) -> Iterator[None]:
    """Move the model to where it runs, and home again whatever happens."""
    run.prepared.to(run.devices.model)
    try:
        yield
    finally:
        run.prepared.to(run.devices.home)


def _capture(run: _Run, group: list[QuantOp], batches: list[Inputs], show: Show) -> dict[str, Captured]:
    """Return the operands and gradients of a group of products, on the device of the model."""
    on_device = (tuple(x.to(run.devices.model) for x in batch) for batch in batches)
    return capture(
        run.observed,
        group,
        counted(on_device, show, "capture operands and gradients", _images(batches)),
        loss=get_loss(run.options.loss, run.options.seed),
        with_gradient=any(get_metric(run.plan.searches[op.name].metric).weighted_by_gradient for op in group),
        quantized=run.results if run.options.sequential else None,
    )


def _search_all(run: _Run, ops: list[QuantOp], captured: dict[str, Captured], searches: int) -> Iterator[QuantOp]:
    """Search products, so many at the same time, and yield each when it is done.

    On a CPU every search has one thread: its operations are small, and threads of their own keep the cores busier than
    threads within them. It also makes the result independent of how many run beside it.
    """
    on_cpu = run.devices.search.type == "cpu"
    pool = single_threaded_pool(searches, "search") if on_cpu else ThreadPoolExecutor(searches, "search")
    waiting = {pool.submit(_search, run, op, captured): op for op in ops}
    try:
        for done in as_completed(list(waiting)):
            run.add(waiting[done], *done.result())
            yield waiting.pop(done)
    finally:
        pool.shutdown(cancel_futures=True)
        for future, op in waiting.items():  # after Ctrl-C: what was being searched is done by now
            if not future.cancelled() and future.exception() is None:
                run.add(op, *future.result())


def _search(run: _Run, op: QuantOp, captured: dict[str, Captured]) -> tuple[SearchResult | None, float]:
    """Search one product where searches run; return its parameters beside the model, and the seconds it took.

    Of a product that the calibration has, only what else is asked for is searched, and there is no result.
    """
    started, further = time.perf_counter(), run.options.further
    product = captured_product(op, captured.pop(op.name)).to(run.devices.search)
    seed = (run.options.seed * 1_000_003 + zlib.crc32(op.name.encode())) % 2**63
    result = None
    if op.name not in run.results.distances:
        result = search_product(run.plan, op, product, seed, run.devices.home)
    seconds = time.perf_counter() - started
    if further is not None:
        further.search(op, product, seed)
    return result, seconds


def search_product(plan: QuantPlan, op: QuantOp, product: Product, seed: int, home: torch.device) -> SearchResult:
    """Search a captured product as a plan says; return its parameters on the device `home`."""
    lhs, rhs = (plan.quantizers[site(op.name, operand)] for operand in OPERANDS)
    result = search_op(op, product, lhs, rhs, plan.searches[op.name], seed=seed)
    codes = None if result.codes is None else result.codes.to(home)
    return replace(result, lhs=result.lhs.to(home), rhs=result.rhs.to(home), codes=codes)
