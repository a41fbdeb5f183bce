"""What more workers gain: measured with processes of this machine, and predicted for clusters from measured parts.

    python examples/bench_distributed.py local --depth 4 --images 32 --groups 4
    python examples/bench_distributed.py table --width 1024 --depth 24 --heads 16 --images 1024

local: seconds of a random ViT's calibration here and on pools of processes of one thread each, and those predicted.
table: seconds, memory per worker and bytes over the network for 1 to 64 machines like this one. Two blocks of the model
are measured on a few images, and counted as often as the model has blocks and images.

A task is a group of blocks. It captures all images as often as its memory makes it, each time a forward and the part
of a backward behind it, and searches its products. A task goes to whichever worker is free; before all of them, the
state travels to each.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from multiprocessing import get_context
from typing import Annotated

import torch
import typer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.calibrating.memory import PLANNED_SHARE, RESERVED, MemoryBudget
from ptq4vit_fx.calibration import Calibration

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
#: Blocks and images that the parts are measured on.
BLOCKS, IMAGES = 2, 8
#: Share of a worker's memory that operands of captured products take; searches need the rest (calibrating/memory.py).
CAPTURED_SHARE = 0.5


@dataclass(frozen=True)
class Shape:
    """A vision transformer, and how many images of which size in pixels it is calibrated on."""

    width: int
    depth: int
    heads: int
    patch: int
    size: int
    mlp: float
    images: int

    def prepared(self, depth: int) -> GraphModule:
        """Return a prepared model of this shape with random weights, and so many blocks."""
        torch.manual_seed(0)
        sizes = {"img_size": self.size, "patch_size": self.patch, "embed_dim": self.width, "num_heads": self.heads}
        model = VisionTransformer(**sizes, depth=depth, mlp_ratio=self.mlp).eval()
        return ptq.prepare_fx(model, ptq.recipes.best(), self.pixels(1))

    def pixels(self, images: int) -> Tensor:
        """Return random images, (images, 3, size, size)."""
        return torch.randn(images, 3, self.size, self.size)


@dataclass(frozen=True)
class Parts:
    """What one block costs per image, in seconds: forward, backward, search. bytes: of a block's weights as float32.

    captured: bytes per image that a block's operands and gradients take.
    """

    forward: float
    backward: float
    search: float
    captured: int
    bytes: int

    def task(self, shape: Shape, first: int, count: int, memory: float) -> float:
        """Return the seconds of the blocks from `first` on: captures, as often as memory makes them, and searches."""
        whole = count * self.captured * shape.images
        captures = max(1, ceil(whole / (memory * CAPTURED_SHARE)))
        passed = shape.depth * self.forward + (shape.depth - first - count / 2) * self.backward
        return shape.images * (captures * passed + count * self.search)

    def seconds(self, shape: Shape, workers: int, groups: int, memory: float) -> float:
        """Return the seconds of all groups on so many workers, without what travels."""
        ends = [shape.depth * number // groups for number in range(groups + 1)]
        pairs = [(start, end - start) for start, end in pairwise(ends) if end > start]
        return makespan([self.task(shape, *pair, memory) for pair in pairs], workers)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Return when the last of these tasks is done, if each goes, in their order, to the worker that is free first."""
    free = [0.0] * workers
    for own in seconds:
        heapq.heapreplace(free, free[0] + own)
    return max(free)


def calibrated(prepared: GraphModule, images: Tensor, workers: int, groups: int) -> tuple[float, Calibration]:
    """Calibrate on processes with a thread each; return the seconds of the work, without the start of the processes."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(started, range(2 * workers)))
        before = time.perf_counter()
        found = ptq.calibrate(prepared, images, executor=pool, groups=groups, progress=False)
        return time.perf_counter() - before, found


def started(number: int) -> int:
    """Import what a task needs, and leave time for the other processes to come."""
    import ptq4vit_fx.api  # noqa: F401

    time.sleep(1.0)
    return number


def measured_parts(shape: Shape, images: int, blocks: int) -> Parts:
    """Measure two calibrations of some blocks on one process: captured at once, and block by block."""
    prepared, pixels = shape.prepared(blocks), shape.pixels(images)
    (_, whole), (_, apart) = (calibrated(prepared, pixels, 1, groups) for groups in (1, blocks))
    one, several = (found.provenance["capture_seconds"] / images for found in (whole, apart))
    # one = blocks * (f + b); several = blocks * blocks * f + b * (sum of the blocks behind each middle)
    behind = sum(blocks - first - 0.5 for first in range(blocks))
    backward = (blocks * one - several) / (blocks * blocks - behind)
    forward = one / blocks - backward
    search = whole.provenance["search_seconds"] / images / blocks
    budget = MemoryBudget.of(prepared, 1 << 40)
    block = [op.name for op in prepared.plan.ops if op.name.startswith("blocks.0.")]
    own = sum(p.nbytes for name, p in prepared.named_parameters() if "blocks_0" in name.replace(".", "_"))
    captured = sum(budget.captured[name] for name in block)
    return Parts(forward, backward, search, captured, own)


Workers = Annotated[list[int] | None, typer.Option(help="processes, repeatable (default: 1 and 2)")]


@app.command()
def local(
    width: int = 192,
    depth: int = 4,
    heads: int = 3,
    patch: int = 8,
    size: int = 64,
    images: int = 32,
    groups: int = 4,
    workers: Workers = None,
) -> None:
    """Print measured and predicted seconds of one model on processes of this machine."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes: each is a machine of one core
    torch.set_num_threads(1)
    shape = Shape(width, depth, heads, patch, size, 4.0, images)
    parts = measured_parts(shape, images, depth)
    prepared, pixels = shape.prepared(depth), shape.pixels(images)
    here = ptq.calibrate(prepared, pixels, progress=False)
    before = here.provenance.get("balance_seconds", 0.0)
    print(f"here: {here.provenance['seconds']:.1f} s, groups {groups}")
    print("| workers | seconds | predicted | captures | state, MB | same bits |\n|---|---|---|---|---|---|")
    for count in workers or [1, 2]:
        seconds, found = calibrated(prepared, pixels, count, groups)
        expected = before + parts.seconds(shape, count, groups, 1e15)
        same = "yes" if found.fingerprint() == here.fingerprint() else "NO"
        facts = found.provenance
        told = f"{facts['capture_groups']} | {facts['state_bytes'] / 1e6:.1f} | {same}"
        print(f"| {count} | {seconds:.1f} | {expected:.1f} | {told} |", flush=True)


@app.command()
def table(
    width: int = 1024,
    depth: int = 24,
    heads: int = 16,
    patch: int = 16,
    size: int = 224,
    mlp: float = 4.0,
    images: int = 1024,
    memory_gib: Annotated[float, typer.Option(help="memory_limit of each worker")] = 8.0,
    gigabits: Annotated[float, typer.Option(help="of the scheduler's network, per second")] = 10.0,
    few: Annotated[int, typer.Option(help="images that parts are measured on")] = IMAGES,
) -> None:
    """Print what a calibration would take on 1 to 64 machines like this one."""
    shape = Shape(width, depth, heads, patch, size, mlp, images)
    parts = measured_parts(shape, few, BLOCKS)
    told = f"forward {parts.forward:.4f} s, backward {parts.backward:.4f}, search {parts.search:.4f}"
    print(f"per block and image: {told}")
    state = depth * parts.bytes + 4 * images * 3 * size * size
    back = depth * parts.bytes / 4  # the codes of the weights, a byte each
    memory = PLANNED_SHARE * (memory_gib * 2**30 - RESERVED)
    held = state / 2**30 + memory_gib
    print("| machines | groups | hours | gain | memory per worker, GiB | over the network, GB |")
    print("|---|---|---|---|---|---|")
    alone = 0.0
    for count in (1, 8, 16, 32, 64):
        groups = min(depth, 2 * count)
        travels = 0.0 if count == 1 else (count * state + back) / (gigabits * 1e9 / 8)
        seconds = parts.seconds(shape, count, groups, memory) + travels
        alone = alone or seconds
        sent = 0.0 if count == 1 else (count * state + back) / 1e9
        told = f"{seconds / 3600:.2f} | {alone / seconds:.1f} | {held:.1f} | {sent:.1f}"
        print(f"| {count} | {groups} | {told} |", flush=True)


if __name__ == "__main__":
    app()
