"""`calibrate`: images in, a Calibration out. Capture in groups that fit into memory, then search op by op."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.calibration import Calibration, fingerprint_images
from ptq4vit_fx.capture import (
    Loss,
    capture,
    captured_bytes,
    captured_product,
    groups_of_ops,
    pseudo_label_loss,
)
from ptq4vit_fx.errors import failure
from ptq4vit_fx.metrics import get_metric
from ptq4vit_fx.passes.contract import plan_of
from ptq4vit_fx.plan import QuantOp, QuantPlan, Site, site
from ptq4vit_fx.quantizers import QParams
from ptq4vit_fx.search import SearchResult, search_op

#: Images per forward and backward when the data is one tensor.
BATCH_SIZE = 8


def run_calibration(
    prepared: GraphModule,
    data: Tensor | Iterable[Any],
    *,
    seed: int,
    progress: bool,
    device: torch.device | str | None,
    loss: Loss | None,
    memory_limit: int | None,
) -> Calibration:
    """Do the work of `ptq4vit_fx.calibrate`, which documents the arguments; the graph does not change."""
    plan = plan_of(prepared)
    home = next((p.device for p in prepared.parameters()), torch.device("cpu"))
    target = torch.device(device) if device is not None else home
    batches = image_batches(data)
    images = sum(len(batch) for batch in batches)
    limit = memory_limit if memory_limit is not None else psutil.virtual_memory().available // 2
    started = time.perf_counter()
    params: dict[Site, QParams] = {}
    distances: dict[str, tuple[float, float]] = {}
    bar = Progress(
        TextColumn("calibrate {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("products,"),
        TimeRemainingColumn(),
        disable=not progress,
    )
    capture_seconds = 0.0
    prepared.to(target)
    try:
        with bar:
            task = bar.add_task("capture", total=len(plan.ops))
            for group in groups_of_ops(plan.ops, captured_bytes(prepared), images, limit):
                bar.update(task, description="capture operands and gradients")
                capture_started = time.perf_counter()
                captured = capture(
                    prepared,
                    group,
                    (batch.to(target) for batch in batches),
                    loss=loss or pseudo_label_loss,
                    with_gradient=any(_wants_gradient(plan, op) for op in group),
                )
                capture_seconds += time.perf_counter() - capture_started
                for op in group:
                    bar.update(task, description=op.name)
                    result = _search(plan, op, captured_product(op, captured.pop(op.name)), seed)
                    params |= {site(op.name, "lhs"): result.lhs, site(op.name, "rhs"): result.rhs}
                    distances[op.name] = (result.distance_before, result.distance_after)
                    bar.advance(task)
    finally:
        prepared.to(home)
    provenance = {
        "images": images,
        "images_fingerprint": fingerprint_images(batches),
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 3),
        "capture_seconds": round(capture_seconds, 3),
        "device": str(target),
        "torch": torch.__version__,
    }
    return Calibration(plan, params, distances, provenance)


def _wants_gradient(plan: QuantPlan, op: QuantOp) -> bool:
    return get_metric(plan.searches[op.name].metric).weighted_by_gradient


def _search(plan: QuantPlan, op: QuantOp, product: Any, seed: int) -> SearchResult:
    for name, x in (("input", product.lhs), ("weight" if op.rhs_is_weight else "right operand", product.rhs)):
        if not torch.isfinite(x).all():
            raise failure(
                "calibrate",
                f"{name} of {op.name}",
                expected="finite values",
                got="NaN or infinity",
                do="check the weights, and run the float model on these images",
            )
    op_seed = (seed * 1_000_003 + zlib.crc32(op.name.encode())) % 2**63
    lhs, rhs = plan.quantizers[site(op.name, "lhs")], plan.quantizers[site(op.name, "rhs")]
    return search_op(op, product, lhs, rhs, plan.searches[op.name], seed=op_seed)


def image_batches(data: Tensor | Iterable[Any]) -> list[Tensor]:
    """Return the image batches of a tensor, or of an iterable of tensors or (tensor, anything) pairs.

    Raises PTQError if there is no image, if an item is neither, or if an image holds NaN or infinity.
    """
    if isinstance(data, Tensor):
        batches = list(torch.split(data, BATCH_SIZE)) if data.ndim else [data]
    else:
        batches = [_images_of(item) for item in data]
    batches = [batch.detach().float() for batch in batches if batch.ndim == 0 or len(batch)]
    if not batches:
        raise failure(
            "calibrate",
            "data",
            expected="one image or more",
            got="none",
            do="pass a tensor (images, channels, height, width) or an iterable of such batches",
        )
    for number, batch in enumerate(batches):
        if batch.ndim != 4:
            raise failure(
                "calibrate",
                f"batch {number}",
                expected="shape (images, channels, height, width)",
                got=str(tuple(batch.shape)),
                do="add the batch dimension" if batch.ndim == 3 else "pass image batches",
            )
        finite = torch.isfinite(batch).flatten(1).all(1)
        if not finite.all():
            raise failure(
                "calibrate",
                f"batch {number}, image {int((~finite).nonzero()[0])}",
                expected="finite pixels",
                got="NaN or infinity",
                do="check the preprocessing or leave that image out",
            )
    return batches


def _images_of(item: Any) -> Tensor:
    images = item[0] if isinstance(item, (tuple, list)) and item else item
    if isinstance(images, Tensor):
        return images
    raise failure(
        "calibrate",
        "an item of data",
        expected="a tensor, or a tuple that starts with one",
        got=type(images).__name__,
        do="pass a tensor or a DataLoader of images",
    )
