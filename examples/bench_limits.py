"""What every stage takes, in processor seconds and memory, and where the limits are.

    python examples/bench_limits.py growth
    python examples/bench_limits.py extremes
    python examples/bench_limits.py memory

growth: processor seconds and peak memory of prepare, calibrate, convert and export over blocks, images and image size,
with the exponents. extremes: 2,000 images, images of 1024x1024, 300 modules deep, 2 GB of weights. memory: the peak of
a calibration under memory_limit= 256 MiB, 1 and 8 GiB. Random weights; each row in a process of its own (Linux).
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
import typer
from torch import nn

import ptq4vit_fx as ptq

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
#: A small transformer; a row changes some of it.
BASE = {"size": 64, "patch": 8, "blocks": 4, "width": 192, "images": 8, "batch": 8, "deep": 0}
#: Rounds of the search take time, no memory: one is enough to see how it grows.
QUICK = ptq.recipes.ptq4vit().with_search(rounds=1)
STAGES = ("prepare", "calibrate", "convert", "export")


def peak_of(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what work gives, the processor seconds of all its threads, and the peak of resident memory in MiB.

    The peak is above what there was before. Processor seconds say the same on a machine that does something else too.
    """
    start = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    started = time.process_time()
    result = work()
    seconds = time.process_time() - started
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return result, seconds, (peak - start) / 2**20


class Outer(nn.Module):
    """A module around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def model_of(size: int, patch: int, blocks: int, width: int, deep: int) -> nn.Module:
    """Return a transformer with random weights, inside of so many modules around it."""
    arguments = {"img_size": size, "patch_size": patch, "depth": blocks, "embed_dim": width, "num_heads": width // 64}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **arguments)
    for _ in range(deep):
        model = Outer(model)
    return model.eval()


def stages(images: int, batch: int, limit: int | None = None, **shape: int) -> tuple[float, list[float]]:
    """Return the size of the model in MiB, and seconds and peak MiB of every stage, one behind the other."""
    warnings.simplefilter("ignore", ptq.PTQWarning)
    torch.manual_seed(0)
    model = model_of(**shape)
    batches = torch.randn(images, 3, shape["size"], shape["size"]).split(batch)
    prepared, *found = peak_of(lambda: ptq.prepare_fx(model, QUICK, batches[0][:1]))
    _, *more = peak_of(lambda: ptq.calibrate(prepared, batches, progress=False, memory_limit=limit))
    converted, *most = peak_of(lambda: ptq.convert_fx(prepared))
    with tempfile.TemporaryDirectory() as folder:
        _, *last = peak_of(lambda: ptq.export_onnx(converted, Path(folder) / "model.onnx", batches[0][:1]))
    return sum(4 * p.numel() for p in model.parameters()) / 2**20, [*found, *more, *most, *last]


def measure(**changes: int | None) -> tuple[float, list[float]]:
    """Return `stages` of the base with changes, from a process of its own."""
    arguments: dict[str, Any] = {**BASE, **changes}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(stages, **arguments).result()


def row(name: str, value: object, model: float, found: list[float]) -> None:
    """Print one line of the table."""
    cells = [f"{seconds:.1f} s, {peak:.0f} MiB" for seconds, peak in zip(found[::2], found[1::2], strict=True)]
    print(f"| {name} | {value} | {model:.0f} | {' | '.join(cells)} |", flush=True)


def header() -> None:
    """Print the head of the table."""
    print(f"| what | value | weights, MiB | {' | '.join(STAGES)} |\n|---|---|---|{'---|' * len(STAGES)}", flush=True)


@app.command()
def growth() -> None:
    """Print seconds and peak memory of every stage over blocks, images and image size, with exponents."""
    header()
    for name, values in {"blocks": (8, 16, 32, 64), "images": (8, 32, 128), "size": (64, 128, 256)}.items():
        table = []
        for value in values:
            model, found = measure(**{name: value})
            table.append(found)
            row(name, value, model, found)
        slopes = [slope(values, [found[column] for found in table]) for column in range(2 * len(STAGES))]
        cells = [f"{seconds:.2f}, {peak:.2f}" for seconds, peak in zip(slopes[::2], slopes[1::2], strict=True)]
        print(f"| {name} | exponents | | {' | '.join(cells)} |", flush=True)


def slope(values: tuple[int, ...], measured: list[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    x, y = [math.log(v) for v in values], [math.log(max(m, 1e-3)) for m in measured]
    return statistics.linear_regression(x, y).slope


@app.command()
def extremes() -> None:
    """Print what the largest inputs take that people bring."""
    header()
    row("images", "2,000 of 64x64", *measure(images=2000, batch=50))
    row("image size", "4 of 1024x1024, 4,097 tokens", *measure(size=1024, patch=16, images=4, batch=1))
    row("nested modules", "300", *measure(deep=300))
    row("weights", "2.1 GB, 12 blocks", *measure(width=1984, blocks=12, images=4, batch=4))


@app.command()
def memory() -> None:
    """Print the peak of calibrations under a limit, or the sentence that refuses it."""
    print("| model, images | memory_limit | peak above the model's, MiB | share | processor s |\n|---|---|---|---|---|")
    for name, changes in {
        "64x64, 8 blocks of 192, 128 images": {"blocks": 8, "images": 128},
        "224x224, 6 blocks of 384, 16 images": {"size": 224, "patch": 16, "blocks": 6, "width": 384, "images": 16},
        "224x224, 12 blocks of 384, 128 images": {"size": 224, "patch": 16, "width": 384, "blocks": 12, "images": 128},
    }.items():
        for limit in (256, 1024, 8192):
            try:
                _, found = measure(**changes, limit=limit << 20)
            except ptq.PTQError as error:
                print(f"| {name} | {limit} MiB | refused: {error} | | |", flush=True)
                continue
            seconds, peak = found[2:4]
            print(f"| {name} | {limit} MiB | {peak:.0f} | {peak / limit:.0%} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    app()
