"""A group of products: captured together, then searched side by side. On this machine, or on a worker's."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule

from ptq4vit_fx.calibrating.capture import Captured, capture, captured_product
from ptq4vit_fx.calibrating.losses import Loss, get_loss
from ptq4vit_fx.calibrating.options import Devices
from ptq4vit_fx.calibration import Calibration, SearchResult
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.names import OPERANDS, site
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.search.metrics import get_metric
from ptq4vit_fx.search.products import Product
from ptq4vit_fx.search.search_op import search_op
from ptq4vit_fx.torch_state import single_threaded_pool

#: The plans that one product is searched by: the calibration's own is None, a further search has keys of its own.
Plans = Mapping[Hashable, QuantPlan]
#: What was found by each of them, and the seconds that it took.
Results = dict[Hashable, tuple[SearchResult, float]]


@dataclass(frozen=True)
class Setting:
    """What products are captured from, and how.

    observed: the prepared model, or a copy with balanced channels. plan: its own. batches: all images, in their order.
    """

    observed: GraphModule
    plan: QuantPlan
    batches: list[Inputs]
    loss: str | Loss
    seed: int
    devices: Devices


def capture_group(
    setting: Setting, group: list[QuantOp], batches: Iterable[Inputs], quantized: Calibration | None = None
) -> dict[str, Captured]:
    """Return the operands and gradients of a group of products, on the device of the model.

    batches: those of the setting, on that device. quantized: the products that run quantized (sequential calibration).
    """
    return capture(
        setting.observed,
        group,
        batches,
        loss=get_loss(setting.loss, setting.seed),
        with_gradient=any(get_metric(setting.plan.searches[op.name].metric).weighted_by_gradient for op in group),
        quantized=quantized,
    )


def search_group(
    setting: Setting,
    wanted: Mapping[QuantOp, Plans],
    captured: dict[str, Captured],
    searches: int,
    add: Callable[[QuantOp, Results], None],
) -> Iterator[QuantOp]:
    """Search captured products, so many at the same time; hand each to `add` when it is done, and yield it.

    wanted: the plans that each is searched by. On a CPU every search has one thread: its operations are small, and
    threads of their own keep the cores busier than threads within them. It also makes the result independent of how
    many run beside it.
    """
    on_cpu = setting.devices.search.type == "cpu"
    pool = single_threaded_pool(searches, "search") if on_cpu else ThreadPoolExecutor(searches, "search")
    waiting = {pool.submit(_search, setting, op, plans, captured): op for op, plans in wanted.items()}
    try:
        for done in as_completed(list(waiting)):
            add(waiting[done], done.result())
            yield waiting.pop(done)
    finally:
        pool.shutdown(cancel_futures=True)
        for future, op in waiting.items():  # after Ctrl-C: what was being searched is done by now
            if not future.cancelled() and future.exception() is None:
                add(op, future.result())


def _search(setting: Setting, op: QuantOp, plans: Plans, captured: dict[str, Captured]) -> Results:
    """Search one product where searches run; the parameters that are found lie where the model is at home."""
    started = time.perf_counter()
    product = captured_product(op, captured.pop(op.name)).to(setting.devices.search)
    seed = (setting.seed * 1_000_003 + zlib.crc32(op.name.encode())) % 2**63
    found: Results = {}
    for key, plan in plans.items():
        result = search_product(plan, op, product, seed, setting.devices.home)
        found[key] = (result, time.perf_counter() - started)
        started = time.perf_counter()
    return found


def search_product(plan: QuantPlan, op: QuantOp, product: Product, seed: int, home: torch.device) -> SearchResult:
    """Search a captured product as a plan says; return its parameters on the device `home`."""
    lhs, rhs = (plan.quantizers[site(op.name, operand)] for operand in OPERANDS)
    return moved(search_op(op, product, lhs, rhs, plan.searches[op.name], seed=seed), home)


def moved(result: SearchResult, device: torch.device) -> SearchResult:
    """Return a result with its parameters and codes on another device."""
    codes = None if result.codes is None else result.codes.to(device)
    return replace(result, lhs=result.lhs.to(device), rhs=result.rhs.to(device), codes=codes)
