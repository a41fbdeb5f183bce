"""Speed of our files beside float and beside ONNX Runtime's own quantizer, in one interleaved run.

    python examples/bench_onnx.py vit_small_patch16_224 --batch 8 --threads 2

Weights are random and the search is the quickest that there is: neither changes the speed. Every round runs each file
once, in turn, so that a slow moment of the machine hits all of them; medians are compared. With the extra `openvino`
installed the same files run in OpenVINO too. `--exact` gives files for CPUs without VNNI (target onnxruntime-avx2).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import onnx
import timm
import torch
import typer
from onnxruntime import InferenceSession
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.progress import track
from torch import Tensor, nn

import ptq4vit_fx as ptq
from ptq4vit_fx.export.runtime import quiet_options
from ptq4vit_fx.export.runtime_graph import runtime_graph

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Run = Callable[[Tensor], Any]
#: The peers that a ratio is given to: the better of the two.
PEERS = ("quantize_static", "quantize_static u8s8 per channel")


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands images to `quantize_static`, one at a time."""

    def __init__(self, images: Tensor) -> None:
        self.feeds: Iterator[dict[str, Any]] = ({"image": image[None].numpy()} for image in images)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def write_float(model: nn.Module, images: Tensor, path: Path) -> None:
    """Export the float model with a dynamic batch."""
    torch.onnx.export(
        model,
        (images[:2],),
        path,
        dynamo=True,
        opset_version=20,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        external_data=False,
        verbose=False,
    )


def write_peers(folder: Path, images: Tensor) -> None:
    """Let ONNX Runtime quantize the float file: with its defaults, and with int8 weights per channel."""
    prepared = folder / "prepared.onnx"
    quant_pre_process(folder / "float.onnx", prepared, skip_symbolic_shape=True)
    quantize_static(prepared, folder / f"{PEERS[0]}.onnx", Reader(images))
    quantize_static(
        prepared,
        folder / f"{PEERS[1]}.onnx",
        Reader(images),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    prepared.unlink()


def write_ours(folder: Path, model: nn.Module, images: Tensor, target: str) -> None:
    """Export ours with exact twins, and with a uniform quantizer in the place of every twin."""
    for name, twins in (("ours, twin exact", "exact"), ("ours, uniform", "uniform")):
        mapping = ptq.recipes.ptq4vit(twins=twins)
        quick = mapping.with_search(n=2, rounds=1, screen_rows=32, confirm=1, max_shift=1)
        converted = ptq.quantize(model, images, qconfig_mapping=quick)
        ptq.export_onnx(converted, folder / f"{name}.onnx", images[:1], target=target)


def in_onnxruntime(path: Path, threads: int) -> Run:
    """Return a function that runs the file in ONNX Runtime."""
    session = InferenceSession(path, quiet_options(threads), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images.numpy()})


def in_openvino(path: Path, threads: int) -> Run:
    """Return a function that runs the file in OpenVINO's CPU plugin."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    return lambda images: compiled(images.numpy())


def interleaved_seconds(runs: dict[str, Run], images: Tensor, rounds: int) -> dict[str, float]:
    """Return the median seconds of each, all of them run once per round after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in track(range(rounds + 1), "rounds"):
        for name, run in runs.items():
            started = time.perf_counter()
            run(images)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


@app.command(help=__doc__)
def main(
    model: str = "vit_small_patch16_224",
    batch: Annotated[list[int], typer.Option(help="images per run, repeatable")] = [1, 8],  # noqa: B006
    threads: int = 2,
    rounds: int = 15,
    exact: Annotated[bool, typer.Option(help="uint8 weights, for CPUs without VNNI")] = False,
) -> None:
    """Print one Markdown table per batch size."""
    network = timm.create_model(model).eval()
    images = torch.randn(max(8, *batch), *timm.data.resolve_data_config({}, model=network)["input_size"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_float(network, images, folder / "float.onnx")
        write_peers(folder, images[:8])
        write_ours(folder, network, images[:8], "onnxruntime-avx2" if exact else "onnxruntime")
        files = ("float", *PEERS, "ours, uniform", "ours, twin exact")
        graphs = {file: runtime_graph(onnx.load(folder / f"{file}.onnx")) for file in files}
        runtimes = {"ONNX Runtime": in_onnxruntime} | ({"OpenVINO": in_openvino} if find_spec("openvino") else {})
        for size in batch:
            print(f"\n{model}, batch {size}, {threads} threads, medians of {rounds} rounds\n")
            print("| runtime | file | ms per image | times float | times the better peer | integer, float | MB |")
            print("|---|---|---|---|---|---|---|")
            for runtime, open_file in runtimes.items():
                runs = {file: open_file(folder / f"{file}.onnx", threads) for file in files}
                seconds = interleaved_seconds(runs, images[:size], rounds)
                peer = min(seconds[name] for name in PEERS)
                for file, spent in seconds.items():
                    graph, megabytes = graphs[file], (folder / f"{file}.onnx").stat().st_size / 1e6
                    products = f"{len(graph.integer_products)} / {len(graph.float_products)}"
                    print(
                        f"| {runtime} | {file} | {1e3 * spent / size:.1f} | {seconds['float'] / spent:.2f} "
                        f"| {peer / spent:.2f} | {products if runtime == 'ONNX Runtime' else ''} | {megabytes:.1f} |"
                    )


if __name__ == "__main__":
    app()
