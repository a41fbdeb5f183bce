"""What calibration costs, in forward passes of the same images on the same machine, and how it grows.

    python examples/bench_calibration.py cost deit_tiny_p8_64 --fixtures ../shared/fixtures
    python examples/bench_calibration.py exhaustive deit_tiny_p8_64 --fixtures ../shared/fixtures
    python examples/bench_calibration.py devices vit_s14 --fixtures ../shared/fixtures --device cuda
    python examples/bench_calibration.py growth
    python examples/bench_calibration.py memory vit_large_patch16_224 --limit-gib 8

cost: seconds of capture and search, per kind of product, and their ratio to one forward pass of the images.
exhaustive: the same products searched over every candidate on all rows; are the choices the same, and how far is the
distance? devices: the same calibration on the CPU and on a GPU: seconds, choices, distances, top-1. growth: seconds and
peak memory over images, depth and width, each in a process of its own, with the exponent. memory: peak memory of a
large model with random weights under a memory limit.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import psutil
import timm
import torch
import typer
from rich.progress import track
from torch import Tensor, nn
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.plan import QuantOp

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
BATCH = 8
Fixtures = Annotated[Path, typer.Option(help="folder with trained models and images, see examples/accuracy.py")]


def load(model: str, fixtures: Path, images: int) -> tuple[nn.Module, Tensor]:
    """Return a trained model and its calibration images."""
    sys.path.insert(0, str(fixtures))
    import fixtures as source

    network, size = source.load_model(model)
    return network, source.load_images("calib", images, size)[0]


@torch.inference_mode()
def forward_seconds(model: nn.Module, images: Tensor) -> float:
    """Return the median of five forward passes of all images."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for batch in images.split(BATCH):
            model(batch)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def kind(op: QuantOp) -> str:
    """Return what a product is in a transformer."""
    if op.kind == "conv2d":
        return "convolution"
    if op.kind == "matmul":
        return "softmax @ v" if op.lhs_source == "softmax" else "q @ k"
    if op.lhs_source is not None:
        return "post-GELU linear"
    return "q/k/v linear" if "qkv" in op.name else "linear"


@app.command()
def cost(
    model: str,
    fixtures: Fixtures,
    images: int = 32,
    bits: int = 8,
    recipe: str = "ptq4vit",
    repeats: Annotated[int, typer.Option(help="the run with the median ratio is printed")] = 3,
) -> None:
    """Print the cost of a calibration in forward passes, timed directly before and after it."""
    network, pixels = load(model, fixtures, images)
    prepared = ptq.prepare_fx(network, getattr(ptq.recipes, recipe)(bits, bits), pixels[:1])
    runs: list[tuple[float, int, Calibration]] = []
    forwards = [forward_seconds(network, pixels)]
    for _ in range(repeats):
        calibration = ptq.calibrate(prepared, pixels)
        forwards.append(forward_seconds(network, pixels))
        runs.append((calibration.provenance["seconds"] / statistics.mean(forwards[-2:]), len(runs), calibration))
    runs.sort()
    ratio, _, calibration = runs[(repeats - 1) // 2]
    facts = calibration.provenance
    forward = facts["seconds"] / ratio
    rows = defaultdict(list)
    for op in prepared.plan.ops:
        rows[kind(op)].append(calibration.seconds[op.name])
    ratios = ", ".join(f"{run[0]:.1f}" for run in runs)
    print(
        f"{model}, {images} images, {torch.get_num_threads()} threads: one forward pass {forward:.2f} s, runs: {ratios}"
    )
    print("| | products | seconds | forward passes |\n|---|---|---|---|")
    print(f"| capture | | {facts['capture_seconds']:.1f} | {facts['capture_seconds'] / forward:.1f} |")
    wall = facts["search_seconds"] / sum(calibration.seconds.values())  # several searches run at the same time
    for name, values in rows.items():
        spent = sum(values) * wall
        print(f"| search: {name} | {len(values)} | {spent:.1f} | {spent / forward:.1f} |")
    print(f"| all | {len(calibration.plan.ops)} | {facts['seconds']:.1f} | {ratio:.1f} |")


@app.command()
def exhaustive(
    model: str,
    fixtures: Fixtures,
    images: int = 32,
    bits: int = 8,
    only: Annotated[str, typer.Option(help="regular expression: only these products")] = "",
    score: Annotated[int, typer.Option(help="validation images for top-1, if every product is compared")] = 1000,
) -> None:
    """Compare the choices with those of a search over every candidate on all rows."""
    network, pixels = load(model, fixtures, images)
    recipe = ptq.recipes.ptq4vit(bits, bits)
    found = {}
    for name, mapping in (("default", recipe), ("exhaustive", recipe.with_search(screen_rows=None))):
        some = ptq.QConfigMapping().set_global(None).set_module_name_regex(only, mapping.global_qconfig)
        prepared = ptq.prepare_fx(network, some if only else mapping, pixels[:1])
        found[name] = (prepared, ptq.calibrate(prepared, pixels))
    plan = plan_of(found["default"][0])
    ours, best = (calibration for _, calibration in found.values())
    print("| product | same lhs | same rhs | distance, default / exhaustive |\n|---|---|---|---|")
    ratios = []
    for op in plan.ops:
        same = [same_params(ours, best, f"{op.name}:{operand}") for operand in ("lhs", "rhs")]
        mine, theirs = ours.distances[op.name][1], best.distances[op.name][1]
        ratios.append(mine / theirs if theirs else float(mine == theirs))
        print(f"| {op.name} | {same[0]:.0%} | {same[1]:.0%} | {ratios[-1]:.4f} |")
    over = sum(ratio > 1.01 for ratio in ratios)
    print(f"{len(ratios)} products, W{bits}A{bits}: ratio at most {max(ratios):.4f}, {over} above 1.01")
    seconds = [calibration.provenance["seconds"] for calibration in (ours, best)]
    print(f"{seconds[0]:.1f} s against {seconds[1]:.1f} s")
    if not only:
        scored = load_scored(score, pixels)
        for name, (prepared, _) in found.items():
            print(f"{name}: top-1 {simulated_top1(prepared, *scored, 'cpu'):.2%} on {score} images")


def load_scored(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return validation images of the size of `like`, and their labels; `load` has been called before."""
    import fixtures as source

    images, labels = source.load_images("val", count, like.shape[-1])
    return images, labels


def simulated_top1(prepared: GraphModule, images: Tensor, labels: Tensor, device: str) -> float:
    """Return the share of images that a calibrated model classifies right."""
    converted = ptq.convert_fx(prepared).to(device)
    with torch.inference_mode():
        top1 = torch.cat([converted(batch.to(device)).argmax(1).cpu() for batch in track(images.split(25), "score")])
    return float((top1 == labels).float().mean())


@app.command()
def devices(
    model: str,
    fixtures: Fixtures,
    device: Annotated[str, typer.Option(help="of PyTorch")] = "cuda",
    images: int = 32,
    bits: int = 8,
    repeats: int = 3,
    score: Annotated[int, typer.Option(help="validation images for top-1, computed on the device")] = 1000,
) -> None:
    """Calibrate on the CPU, on another device, and there with the model left on the CPU; compare with every candidate.

    Distances are those of the same operands: what the CPU chose is compared with an exhaustive search, on the device,
    of operands that the CPU captured.
    """
    network, pixels = load(model, fixtures, images)
    recipe = ptq.recipes.ptq4vit(bits, bits)
    prepared = ptq.prepare_fx(network, recipe, pixels[:1])
    every = ptq.prepare_fx(network, recipe.with_search(screen_rows=None), pixels[:1])
    there: dict[str, Any] = {"device": device}
    apart: dict[str, Any] = {"search_device": device}
    calibrate = partial(ptq.calibrate, data=pixels, progress=False)
    ptq.calibrate(prepared, pixels[:2], progress=False, **there)  # loads kernels
    captured_there, captured_here = calibrate(every, **there), calibrate(every, **apart)
    scored = load_scored(score, pixels)
    print("| calibrated | runs, seconds | capture | search | same in all runs | distance / exhaustive | top-1 |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for name, arguments, count, best in (
        ("on the CPU", {}, 1, captured_here),
        (f"on {device}", there, repeats, captured_there),
        (f"on the CPU, searched on {device}", apart, 1, captured_here),
    ):
        runs = [calibrate(prepared, **arguments) for _ in range(count)]
        facts = sorted((run.provenance for run in runs), key=lambda run: run["seconds"])[(count - 1) // 2]
        times = ", ".join(f"{run.provenance['seconds']:.2f}" for run in runs)
        same = "yes" if len({run.fingerprint() for run in runs}) == 1 else "NO"
        ratios = [runs[-1].distances[key][1] / value[1] for key, value in best.distances.items()]
        top1 = simulated_top1(prepared, *scored, device)
        print(
            f"| {name} | {times} | {facts['capture_seconds']:.2f} | {facts['search_seconds']:.2f} | {same} | "
            f"{min(ratios):.4f} to {max(ratios):.4f} | {top1:.2%} of {score} |",
            flush=True,
        )
        found.append((name, runs[-1]))
    (reference, first), *others = found
    for name, calibration in others:
        shares = [same_params(calibration, first, key) for key in first.params]
        print(f"{name}: {sum(shares) / len(shares):.1%} of the scales are those {reference}")


def same_params(first: Calibration, second: Calibration, site: str) -> float:
    """Return the share of equal scales (a twin counts as one), but for the last bits of a range."""
    a, b = first.params[site], second.params[site]
    names = ("scale",) if hasattr(a, "scale") else ("fine_scale", "coarse_scale")
    same = [torch.isclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=0).float().mean() for name in names]
    return float(min(same))


def measure(images: int, depth: int, width: int) -> tuple[float, float]:
    """Calibrate a random ViT (64 pixels, patch 8) in this process; return seconds and peak MiB on top of the model."""
    model = timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=200
    ).eval()
    return calibrate_and_watch(model, torch.randn(images, 3, 64, 64), None, {})


def calibrate_and_watch(
    model: nn.Module, images: Tensor, limit: int | None, search: dict[str, Any]
) -> tuple[float, float]:
    """Return the seconds of a calibration and the peak of the process's memory above its start, in MiB."""
    mapping = ptq.recipes.ptq4vit().with_search(**search)
    prepared = ptq.prepare_fx(model, mapping, images[:1])
    start = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    calibration = ptq.calibrate(prepared, images, memory_limit=limit, progress=limit is not None)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return calibration.provenance["seconds"], (peak - start) / 2**20


@app.command()
def growth() -> None:
    """Print seconds and peak memory over images, depth and width."""
    base = {"images": 32, "depth": 6, "width": 192}
    print("| varied | value | seconds | peak MiB |\n|---|---|---|---|")
    for name, values in {"images": (8, 32, 128, 512), "depth": (3, 6, 12, 24), "width": (192, 384, 768)}.items():
        seconds, memory = [], []
        for value in values:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                spent, peak = pool.submit(measure, **(base | {name: value})).result()
            seconds.append(spent)
            memory.append(peak)
            print(f"| {name} | {value} | {spent:.1f} | {peak:.0f} |", flush=True)
        print(f"| {name} | exponent | {exponent(values, seconds):.2f} | {exponent(values, memory):.2f} |", flush=True)


def exponent(values: tuple[int, ...], measured: list[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    x, y = [math.log(v) for v in values], [math.log(m) for m in measured]
    return statistics.linear_regression(x, y).slope


@app.command()
def memory(
    model: str,
    limit_gib: float = 8.0,
    images: int = 32,
    rounds: Annotated[int, typer.Option(help="fewer rounds are faster and take the same memory")] = 3,
) -> None:
    """Print the peak memory of calibrating a timm model with random weights under a limit."""
    network = timm.create_model(model).eval()
    size = timm.data.resolve_data_config({}, model=network)["input_size"]
    seconds, peak = calibrate_and_watch(
        network, torch.randn(images, *size), round(limit_gib * 2**30), {"rounds": rounds}
    )
    print(f"{model}, {images} images of {size}: {seconds:.0f} s, peak {peak / 1024:.2f} GiB, limit {limit_gib} GiB")


if __name__ == "__main__":
    app()
