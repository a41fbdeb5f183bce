"""`calibrate`: images in, a Calibration out. Capture in groups that fit into memory, then search op by op."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule

from ptq4vit_fx.calibrating.capture import Captured
from ptq4vit_fx.calibrating.fit import WEIGHTS_FINGERPRINT, check_shapes, weights_fingerprint
from ptq4vit_fx.calibrating.group_search import Plans, Results, Setting, capture_group, moved, search_group
from ptq4vit_fx.calibrating.group_tasks import Tally, search_elsewhere
from ptq4vit_fx.calibrating.memory import MemoryBudget, default_memory_limit, searches_at_once
from ptq4vit_fx.calibrating.options import CalibrationOptions, Devices
from ptq4vit_fx.calibrating.ranges import measure_balances
from ptq4vit_fx.calibration import Calibration, fingerprint_tensors
from ptq4vit_fx.errors import failure, warn
from ptq4vit_fx.files import check_writable
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.inputs.items import model_inputs
from ptq4vit_fx.inputs.plausible import NORMALIZATION, warn_of_implausible
from ptq4vit_fx.inputs.progress import Show, UnderWay, counted, shown
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.apply_balances import apply_balances
from ptq4vit_fx.passes.graph.contract import plan_of, sharing_tensors
from ptq4vit_fx.plan import QuantOp, QuantPlan

#: What a checkpoint must share with the calibration that resumes it.
IDENTITY = ("images_fingerprint", WEIGHTS_FINGERPRINT, "seed", "loss", "sequential")


def run_calibration(prepared: GraphModule, data: Any, options: CalibrationOptions) -> Calibration:
    """Do the work of `ptq4vit_fx.calibrate`; the graph does not change."""
    started = time.perf_counter()
    devices = Devices.of(prepared, options)
    if options.executor is not None:  # what is left to this machine is done where the model is
        devices = Devices(devices.home, devices.home, devices.home)
    batches = batches_for(prepared, data, "calibrate", images=options.images, progress=options.progress is True)
    warn_of_implausible(batches, model_inputs(prepared), "calibrate", prepared.meta.get(NORMALIZATION))
    run = _start(prepared, batches, options, devices)
    schedule = _schedule(run, batches)
    with _model_at_work(run), shown(options.progress) as show:
        if run.plan.balances:
            with run.timed("balance"):
                run.balance(schedule.batches, show)
        facts = (_search_here if options.executor is None else _search_elsewhere)(run, schedule, show)
    seconds = {"seconds": round(time.perf_counter() - started, 3)}
    seconds |= {f"{name}_seconds": round(value, 3) for name, value in run.seconds.items()}
    for remark in run.results.remarks():
        warn(str(remark))
    return run.results.with_provenance(seconds | facts)


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
        return [op for op in self.plan.ops if self.wanted(op)]

    def wanted(self, op: QuantOp) -> Plans:
        """Return the plans that a product is still to be searched by."""
        further = {} if self.options.further is None else self.options.further.left(op)
        return further if op.name in self.results.distances else {None: self.plan, **further}

    def setting(self, batches: list[Inputs]) -> Setting:
        """Return what products are captured from."""
        return Setting(self.observed, self.plan, batches, self.options.loss, self.options.seed, self.devices)

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

    def add(self, op: QuantOp, found: Results, *, save: bool = True) -> None:
        """Take what was found of a product; it lies where the model is at home."""
        for key, (result, seconds) in found.items():
            if key is not None:
                assert self.options.further is not None
                self.options.further.add(op, key, result, seconds)
                continue
            self.results = self.results.with_result(op.name, result, seconds)
            if save:
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
    searches = budget.searches(left, images, searches_at_once(devices.search))
    if options.executor is not None:  # each worker cuts its own products by its own memory
        return _Schedule([], budget.split(batches), searches)
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


def _search_here(run: _Run, schedule: _Schedule, show: Show) -> dict[str, Any]:
    """Capture and search group by group; return the facts of it for the provenance."""
    setting = run.setting(schedule.batches)
    for group in schedule.groups:
        with run.timed("capture"):
            captured = _capture(run, setting, group, show)
        with run.timed("search"):
            show(run.searched(group[0]))
            for op in search_group(setting, {op: run.wanted(op) for op in group}, captured, schedule.searches, run.add):
                show(run.searched(op))
    return {"capture_groups": len(schedule.groups)}


def _capture(run: _Run, setting: Setting, group: list[QuantOp], show: Show) -> dict[str, Captured]:
    """Return the operands and gradients of a group of products, on the device of the model."""
    on_device = (tuple(x.to(run.devices.model) for x in batch) for batch in setting.batches)
    batches = counted(on_device, show, "capture operands and gradients", _images(setting.batches))
    return capture_group(setting, group, batches, run.results if run.options.sequential else None)


def _search_elsewhere(run: _Run, schedule: _Schedule, show: Show) -> dict[str, Any]:
    """Let the workers of the executor capture and search; return the facts of it for the provenance."""
    options, tally, home = run.options, Tally(), run.devices.home
    wanted = {op: run.wanted(op) for op in run.left}
    if not wanted:
        return tally.facts()
    assert options.executor is not None
    show(run.searched(next(iter(wanted))))
    setting = replace(run.setting(schedule.batches), devices=Devices.of(run.prepared, options))
    parts = (options.executor, options.memory_limit, options.groups, tally)
    for found in search_elsewhere(setting, wanted, *parts):
        for name, own in found.items():
            results = {key: (moved(result, home), seconds) for key, (result, seconds) in own.items()}
            run.add(run.plan.op(name), results, save=False)
        run.save()
        show(run.searched(run.plan.op(name)))
    return tally.facts()
