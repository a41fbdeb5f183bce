"""Append a row of ratios to benchmarks/results.jsonl, and print what moved against the last row of this machine.

    python benchmarks/record.py

What the ratios are stands in benchmarks/README.md.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer

import ptq4vit_fx as ptq
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.proof.instructions import cpu_instructions
from ptq4vit_fx.export.proof.latency import Opened, Spread, in_turn
from ptq4vit_fx.export.proof.static_baseline import write_static
from ptq4vit_fx.tools.digits import load_digits_images, load_digits_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results.jsonl")
STATIC = "quantize_static u8s8 per channel"
#: The search that costs least: what it chooses does not change the speed.
QUICKEST = {"n": 2, "rounds": 1, "screen_rows": 32, "confirm": 1, "max_shift": 1}
REPEATS = 5
Row = Mapping[str, Any]


def file_ratios(folder: Path, rounds: int) -> dict[str, Spread]:
    """Return how many times longer the float file takes than each int8 file, one image at a time."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    images = torch.randn(8, 3, 224, 224)
    export_float(model, folder / "float.onnx", images[:1])
    files = {"float": folder / "float.onnx"}
    static = write_static(folder / "float.onnx", folder, "image", [image[None].numpy() for image in images])
    files["quantize_static"] = static[STATIC]
    for twins in ("uniform", "exact"):
        recipe = ptq.recipes.ptq4vit(twins=twins).with_search(**QUICKEST)
        converted = ptq.quantize(model, images, qconfig_mapping=recipe, progress=False)
        files[twins] = folder / f"{twins}.onnx"
        ptq.export_onnx(converted, files[twins], images[:1])
    times = in_turn({name: Opened.of(str(path)).runs(1) for name, path in files.items()}, rounds=rounds)
    return {name: times.ratio("float", name) for name in files if name != "float"}


def calibration_ratio() -> Spread:
    """Return how many forward passes of its images a calibration of the digits model takes."""
    model, images = load_digits_model(), load_digits_images("train")[0][:32]
    forward, calibrate = partial(model, images), partial(_calibrate, model, images)
    calibrate()
    return Spread.of([_seconds(calibrate) / _seconds(forward, 20) for _ in range(REPEATS)])


def _calibrate(model: torch.nn.Module, images: torch.Tensor) -> None:
    prepared = ptq.prepare_fx(model, ptq.recipes.ptq4vit(), images[:1])
    ptq.calibrate(prepared, images, progress=False)


def _seconds(work: Callable[[], Any], times: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def moved(before: Row | None, now: Row) -> list[str]:
    """Return a line for each ratio whose quartiles do not overlap with those of the row before; None: there is none."""
    if before is None:
        return ["no row of this machine and these versions yet: this is the first"]
    lines = []
    for name, own in now["ratios"].items():
        other = before["ratios"].get(name)
        if other is not None and (own["low"] > other["high"] or own["high"] < other["low"]):
            lines.append(f"{name}: {other['median']:.2f} at {before['commit']}, {own['median']:.2f} now")
    return lines or [f"nothing moved since {before['commit']} by more than the noise"]


def last_like(rows: Sequence[Row], now: Row) -> Row | None:
    """Return the newest row of the same machine and versions."""
    same = [row for row in rows if all(row[key] == now[key] for key in ("machine", "versions"))]
    return same[-1] if same else None


def commit() -> str:
    """Return the commit that is checked out, with a + where files were changed since."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() + ("+" if changed else "")


def main(
    rounds: Annotated[int, typer.Option(min=5, help="of all files in turn")] = 30,
    results: Annotated[Path, typer.Option(help="the table that a row is appended to")] = RESULTS,
) -> None:
    """Measure, append a row, and say what moved."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        ratios = file_ratios(Path(folder), rounds) | {"calibration": calibration_ratio()}
    now = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": f"{cpu_instructions().cpu}, {torch.get_num_threads()} threads, {platform.system()}",
        "versions": {name: version(name) for name in ("torch", "onnxruntime")} | {"numpy": np.__version__},
        "ratios": {name: asdict(spread) for name, spread in ratios.items()},
    }
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for name, spread in ratios.items():
        print(f"{name:18}{spread.median:8.2f}  ({spread.low:.2f} to {spread.high:.2f})")
    print("\n".join(moved(last_like(rows, now), now)))
    with results.open("a", encoding="utf-8") as table:
        table.write(json.dumps(now) + "\n")


if __name__ == "__main__":
    typer.run(main)
