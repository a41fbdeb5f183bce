"""Speed of our files beside float and beside ONNX Runtime's own quantizer, in one interleaved run.

    python examples/bench_onnx.py --model vit_small_patch16_224 --batch 8
    python examples/bench_onnx.py --model vit_s14 --batch 8 --fixtures ../shared/fixtures

Weights are random and the search is the quickest that there is: the products are the same ones, but "auto" chooses
others, and softmax twins have lower thresholds, which costs one operator more (docs/speed.md). With `--fixtures` the
model is a trained one, quantized with the default search, and top-1 stands beside each.
Every round runs each file once, in turn, so that a slow moment of the machine hits all of them; medians are compared.
"Floor" is the multiplications of a file over the rate of one integer product, plus the bytes that its products read and
write over the rate of a copy, both rates measured in the same run.
With the extra `openvino` the files for it run in OpenVINO too, beside NNCF's if `nncf` is installed. `--exact` gives
files for CPUs without VNNI (target onnxruntime-avx2).
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import timm
import torch
import typer
from rich.progress import track
from runtimes import Run, in_onnxruntime, in_openvino, write_nncf
from torch import Tensor, nn
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.integer_products import in_qdq_form
from ptq4vit_fx.export.model_files import load_file, message_of
from ptq4vit_fx.export.proof.latency import in_turn
from ptq4vit_fx.export.proof.runtime_graph import runtime_graph
from ptq4vit_fx.export.proof.static_baseline import BASELINES, write_static

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
#: The peers in ONNX Runtime. The best peer is the fastest of them and, in OpenVINO, of NNCF.
PEERS = tuple(BASELINES)
#: Kind of twins -> the file's name.
OURS = {
    "uniform": "ours, uniform",
    "auto": "ours, auto",
    "wide": "ours, twin wide",
    "exact": "ours, twin exact",
}
HEADER = """\
| runtime | file | ms per image | times float | times the best peer | floor | integer, float products | MB | top-1 |
|---|---|---|---|---|---|---|---|---|"""
#: The search that costs least: what it chooses does not change the speed.
QUICKEST = {"n": 2, "rounds": 1, "screen_rows": 32, "confirm": 1, "max_shift": 1}


def write_ours(model: nn.Module, images: Tensor, search: dict[str, Any], folders: dict[str, Path]) -> None:
    """Export ours with each kind of twins for each target (target -> folder), wide ones for ONNX Runtime alone.

    In OpenVINO these cost what exact ones do. "auto" is what `choose_twins` makes of the exact one, on the second half
    of the images.
    """

    def write(kind: str, prepared: GraphModule) -> None:
        converted = ptq.convert_fx(prepared)
        for target, folder in folders.items():
            if (target, kind) != ("openvino", "wide"):
                ptq.export_onnx(converted, folder / f"{OURS[kind]}.onnx", images[:1], target=target)

    for kind in ("uniform", "wide", "exact"):
        mapping = ptq.recipes.ptq4vit(twins=kind).with_search(**search)
        prepared = ptq.prepare_fx(model, mapping, images[:1])
        ptq.calibrate(prepared, images)
        write(kind, prepared)
    chosen, report = ptq.choose_twins(prepared, images)
    print(report)
    write("auto", chosen)


def median_seconds(runs: dict[str, Run], images: Tensor, rounds: int) -> dict[str, float]:
    """Return the median seconds of each, all of them run in turn."""
    found = in_turn({name: partial(run, images) for name, run in runs.items()}, rounds=rounds)
    return {name: found.spread(name).median / 1000 for name in runs}


def measure_rates(threads: int) -> tuple[float, float]:
    """Return multiplications per second of an integer product in ONNX Runtime, and bytes per second of a copy.

    The product is that of ViT-S's first MLP layer at batch 8; the copy is of 8 MB, the size of an activation, which
    lies in the last cache.
    """
    rows, inner, columns = 1576, 384, 1536
    value = onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(np.ones((inner, columns), np.int8), "weight")
    node = onnx.helper.make_node("MatMulInteger", ["image", "weight"], ["product"])
    inputs = [value("image", onnx.TensorProto.UINT8, [rows, inner])]
    outputs = [value("product", onnx.TensorProto.INT32, [rows, columns])]
    graph = onnx.helper.make_graph([node], "product", inputs, outputs, [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "product.onnx")
        multiply = in_onnxruntime(Path(folder) / "product.onnx", threads)
    codes, source = torch.ones((rows, inner), dtype=torch.uint8), torch.zeros(2**21)
    target = torch.empty_like(source)
    (product,) = median_seconds({"multiply": multiply}, codes, 15).values()
    (copy,) = median_seconds({"copy": lambda _: target.copy_(source)}, codes, 15).values()
    return rows * inner * columns / product, 2 * source.nbytes / copy


def count_work(path: Path, batch: int) -> tuple[int, int]:
    """Return the multiplications of a file's products, and the bytes of their operands (as codes) and results.

    A runtime that fused everything else into them would still do this.
    """
    graph = onnx.shape_inference.infer_shapes(message_of(in_qdq_form(load_file(path)))).graph
    shapes = {t.name: (list(t.dims), t.data_type) for t in graph.initializer}
    for info in (*graph.value_info, *graph.input, *graph.output):
        tensor = info.type.tensor_type
        shapes[info.name] = ([d.dim_value or batch for d in tensor.shape.dim], tensor.elem_type)
    codes = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    multiplications = moved = 0
    for node in graph.node:
        if node.op_type == "MatMul":
            multiplications += int(np.prod(shapes[node.output[0]][0])) * shapes[node.input[0]][0][-1]
            for name in (*node.input, *node.output):
                dims, kind = shapes[codes.get(name, name)]
                moved += int(np.prod(dims)) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return multiplications, moved


def top1(run: Run, images: Tensor, labels: Tensor, what: str) -> float:
    """Return the share of images that are classified right."""
    found = [run(batch).argmax(1) for batch in track(images.split(8), what, transient=True)]
    return float((np.concatenate(found) == labels.numpy()).mean())


@app.command(help=__doc__)
def main(
    model: str = "vit_small_patch16_224",
    batch: Annotated[list[int], typer.Option(help="images per run, repeatable")] = [1, 8],  # noqa: B006
    threads: int = 2,
    rounds: int = 15,
    exact: Annotated[bool, typer.Option(help="uint8 weights, for CPUs without VNNI")] = False,
    fixtures: Annotated[Path | None, typer.Option(help="trained models and images, see accuracy.py")] = None,
    score: Annotated[int, typer.Option(help="images for top-1, with --fixtures")] = 2000,
) -> None:
    """Print one Markdown table per batch size."""
    if fixtures is None:
        network = timm.create_model(model).eval()
        images = torch.randn(max(8, *batch), *timm.data.resolve_data_config({}, model=network)["input_size"])
        calibration_images, search = images[:8], QUICKEST
    else:
        sys.path.insert(0, str(fixtures))
        import fixtures as source

        network, size = source.load_model(model)
        calibration_images, search = source.load_images("calib", 32, size)[0], {}
        images, labels = source.load_images("val", max(score, *batch), size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for_openvino = folder / "openvino"
        for_openvino.mkdir()
        export_float(network, folder / "float.onnx", calibration_images[:1])
        feeds = [image[None].numpy() for image in calibration_images]
        write_static(folder / "float.onnx", folder, "image", feeds)
        folders = {"onnxruntime-avx2" if exact else "onnxruntime": folder}
        peers = [folder / f"{file}.onnx" for file in ("float", *PEERS)]
        runtimes = {"ONNX Runtime": (in_onnxruntime, [*peers, *(folder / f"{file}.onnx" for file in OURS.values())])}
        if find_spec("openvino"):
            folders["openvino"] = for_openvino
            ours = [for_openvino / f"{OURS[kind]}.onnx" for kind in ("uniform", "auto", "exact")]
            runtimes["OpenVINO"] = (in_openvino, [*peers, *ours])
        write_ours(network, calibration_images, search, folders)
        if find_spec("openvino") and find_spec("nncf"):
            write_nncf(folder, calibration_images)
            runtimes["OpenVINO"][1].append(folder / "NNCF.xml")
        opened = {
            runtime: {path.stem: open_file(path, threads) for path in paths}
            for runtime, (open_file, paths) in runtimes.items()
        }
        graphs = {path.stem: runtime_graph(load_file(path)) for path in runtimes["ONNX Runtime"][1]}
        multiplications_per_second, bytes_per_second = measure_rates(threads)
        print(f"\n{multiplications_per_second / 1e9:.0f} integer GMAC/s, {bytes_per_second / 1e9:.1f} GB/s")
        for size in batch:
            print(f"\n{model}, batch {size}, {threads} threads, medians of {rounds} rounds\n")
            print(HEADER)
            for runtime, runs in opened.items():
                seconds = median_seconds(runs, images[:size], rounds)
                best = min(seconds[name] for name in (*PEERS, "NNCF") if name in seconds)
                for path in runtimes[runtime][1]:
                    spent, products, floor, right = seconds[path.stem], "", "", ""
                    if runtime == "ONNX Runtime":
                        graph = graphs[path.stem]
                        products = f"{len(graph.integer_products)} / {len(graph.float_products)}"
                        if path.stem in OURS.values() and not graph.float_products:
                            work, moved = count_work(path, size)
                            least = work / multiplications_per_second + moved / bytes_per_second
                            floor = f"{1e3 * least / size:.1f} ms"
                    if fixtures is not None and size == batch[-1]:
                        right = f"{top1(runs[path.stem], images[:score], labels[:score], path.stem):.2%}"
                    megabytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*")) / 1e6
                    print(
                        f"| {runtime} | {path.stem} | {1e3 * spent / size:.1f} | {seconds['float'] / spent:.2f} "
                        f"| {best / spent:.2f} | {floor} | {products} | {megabytes:.1f} | {right} |",
                        flush=True,
                    )


if __name__ == "__main__":
    app()
