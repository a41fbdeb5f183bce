"""Several quantizers on one model and the same images, in one run: accuracy, agreement, size and speed, as a table.

    python examples/compare.py
    python examples/compare.py --fixtures FOLDER --model deit_tiny_p8_64 --images 1000

Without --fixtures the model is the digits ViT that comes with the package (extra `demo`), so that this runs from the
wheel alone. Ours with uniform quantizers, with exact twins, as `ptq4vit quantize` chooses, and tuned for time; ONNX
Runtime's `quantize_static` with its defaults, as its documentation advises for x86, and with percentiles; NNCF where
`nncf` and `openvino` are installed; torchao's pt2e where `torchao` is, in ONNX Runtime where its model exports, else in
PyTorch. Every one calibrates on the same 32 images; ours chooses forms on 64 others. KL is from the float model, in
nats. A latency is the median of rounds in turn, one image or --batch at a time; "times float" is that of the float file
in the same runtime. Files for OpenVINO are written for it. Where one of the others ends the process, `--without` leaves
it out.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from onnxruntime.quantization import CalibrationMethod
from runtimes import Run, in_onnxruntime, in_openvino, write_nncf
from torch import Tensor, nn
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.errors import foreign
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.proof.float_figures import against_float
from ptq4vit_fx.export.proof.latency import InTurn, in_turn
from ptq4vit_fx.export.proof.static_baseline import BASELINES, write_static
from ptq4vit_fx.twins import KL_ADDED

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ADVISED = BASELINES["quantize_static u8s8 per channel"]
STATIC = BASELINES | {
    "quantize_static percentile": ADVISED | {"calibrate_method": CalibrationMethod.Percentile},
}
FLOAT, DEFAULT, TUNED, TORCHAO, NNCF = "float", "ours, default", "ours, tuned", "torchao pt2e", "NNCF"
#: Where pt2e's model is only scored: its speed is a matter of torch.compile, which needs a compiler.
PYTORCH = "PyTorch"
CALIBRATION_IMAGES, HELD_OUT, BATCH = 32, 64, 50
#: Of exporters: the first dimension of the one input is free.
ANY_BATCH = ({0: torch.export.Dim("batch", min=1, max=1024)},)
HEADER = """\
| runtime | quantized by | top-1 | agrees with float | KL | MB | ms per image | times float |
|---|---|---|---|---|---|---|---|"""


class Other(str, Enum):
    """What is compared where it is installed."""

    torchao = "torchao"
    openvino = "openvino"
    nncf = "nncf"


@dataclass(frozen=True)
class Material:
    """What everybody gets: a float model, images to calibrate on, and labelled ones that nobody has seen.

    held_out: images like those of the calibration, on which ours chooses forms of products.
    """

    network: nn.Module
    calibration: Tensor
    held_out: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Entry:
    """One row: in which runtime what was quantized by whom runs, and its bytes, None where there is no file."""

    runtime: str
    name: str
    run: Run
    size: int | None


def material(fixtures: Path | None, model: str, count: int) -> Material:
    """Return the digits model with its images, or a model of the fixtures folder (described in accuracy.py)."""
    if fixtures is None:
        from ptq4vit_fx.tools.digits import load_digits_images, load_digits_model

        images, labels = load_digits_images("test")
        train = load_digits_images("train")[0]
        calibration, held_out = train[:CALIBRATION_IMAGES], train[CALIBRATION_IMAGES:][:HELD_OUT]
        return Material(load_digits_model(), calibration, held_out, images[:count], labels[:count])
    sys.path.insert(0, str(fixtures))
    import fixtures as source

    network, size = source.load_model(model)
    calibration = source.load_images("calib", CALIBRATION_IMAGES, size)[0]
    held_out = source.load_images("calib", HELD_OUT, size, CALIBRATION_IMAGES)[0]
    return Material(network, calibration, held_out, *source.load_images("val", count, size))


def our_models(given: Material, folder: Path, batch: int) -> dict[str, GraphModule]:
    """Return our calibrated models by name; folder: keeps what two of them share. batch: images at a time.

    "ours, default" is what `ptq4vit quantize` makes. "ours, tuned" keeps as much in the least time, with products in
    float where that is faster; it is for ONNX Runtime, where its products are timed.
    """
    ours: dict[str, GraphModule] = {}
    for twins in ("uniform", "exact"):
        prepared = ptq.prepare_fx(given.network, ptq.recipes.best(twins=twins), given.calibration[:1])
        ptq.calibrate(prepared, given.calibration, progress=False)
        ours[f"ours, {twins}"] = prepared
    options: dict[str, Any] = {"kl_added": KL_ADDED, "held_out": given.held_out, "cache": folder, "progress": False}
    chosen, report = ptq.choose_twins(prepared, given.calibration, **options)
    tuned = ptq.tune(prepared, given.calibration, forms=("exact", "uniform", "float"), batch=batch, **options)
    print(f"{DEFAULT}: {report.headline()}\n{TUNED}: {tuned.point.counts()}, KL {tuned.point.divergence:.2g}")
    return ours | {DEFAULT: chosen, TUNED: tuned.prepared}


def written(ours: Mapping[str, GraphModule], given: Material, folder: Path, target: str) -> Iterator[tuple[str, Path]]:
    """Write models for a target; yield name and path."""
    for name, prepared in ours.items():
        path = folder / f"{name.removeprefix('ours, ')}.onnx"
        ptq.export_onnx(ptq.convert_fx(prepared), path, given.calibration[:1], target=target)
        yield name, path


def pt2e(given: Material) -> nn.Module:
    """Return what torchao's pt2e makes of the model for x86: quantize and dequantize around its products."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = (given.calibration[:2],)
    program = torch.export.export(given.network, example, dynamic_shapes=ANY_BATCH)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    for image in given.calibration:
        prepared(image[None])
    converted: nn.Module = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return converted


def torchao_entry(given: Material, folder: Path, threads: int) -> Entry:
    """Return pt2e's model in ONNX Runtime where torch exports it and the runtime opens it, else in PyTorch."""
    converted, path = pt2e(given), folder / "pt2e.onnx"
    try:
        with foreign("torch.onnx.export", TORCHAO, expected="a model that exports and opens", do="run it in PyTorch"):
            options: Any = {"dynamo": True, "opset_version": 20, "verbose": False, "dynamic_shapes": ANY_BATCH}
            torch.onnx.export(converted, (given.calibration[:2],), path, **options)
            size = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))  # weights may lie beside it
            return Entry("ONNX Runtime", TORCHAO, in_onnxruntime(path, threads), size)
    except ptq.PTQError as error:
        print(f"{error}\n")
    return Entry(PYTORCH, TORCHAO, no_gradients(converted), None)


def no_gradients(model: nn.Module) -> Run:
    """Return a function that runs a model without gradients."""

    @torch.no_grad()
    def run(images: Tensor) -> Any:
        return model(images).numpy()

    return run


def entries(given: Material, folder: Path, threads: int, batch: int, used: Collection[Other]) -> Iterator[Entry]:
    """Quantize with ours, quantize_static and these packages; yield a row each, the float one of a runtime first."""
    export_float(given.network, folder / "float.onnx", given.calibration[:1])
    images = [image[None].numpy() for image in given.calibration]
    static = write_static(folder / "float.onnx", folder, "image", images, STATIC)
    shared = [(FLOAT, folder / "float.onnx"), *static.items()]
    ours = our_models(given, folder / "forms", batch)
    for name, path in (*shared, *written(ours, given, folder, "onnxruntime")):
        yield Entry("ONNX Runtime", name, in_onnxruntime(path, threads), path.stat().st_size)
    if Other.torchao in used:
        yield torchao_entry(given, folder, threads)
    if Other.openvino in used:
        own = folder / "openvino"
        own.mkdir()
        del ours[TUNED]
        for name, path in (*shared, *written(ours, given, own, "openvino")):
            yield Entry("OpenVINO", name, in_openvino(path, threads), path.stat().st_size)
        if Other.nncf in used:
            path = write_nncf(folder, given.calibration)
            size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
            yield Entry("OpenVINO", NNCF, in_openvino(path, threads), size)


def answers(run: Run, given: Material) -> Tensor:
    """Return the logits of all labelled images."""
    return torch.cat([torch.as_tensor(run(batch)) for batch in given.images.split(BATCH)])


def figures(entry: Entry, given: Material, expected: Tensor) -> str:
    """Return top-1, agreement with float and KL of a row as cells of a Markdown table; expected: float's logits."""
    outputs = answers(entry.run, given)
    found = against_float({"logits": expected.numpy()}, {"logits": outputs.numpy()}, kind="classes")
    right = float((outputs.argmax(1) == given.labels).float().mean())
    return f"{right:.2%} | {found.score:.2%} | {found.divergence:.2g}"


def row(entry: Entry, cells: str, times: InTurn[tuple[str, str]], batch: int) -> str:
    """Return a row of the table."""
    own, start = (entry.runtime, entry.name), f"| {entry.runtime} | {entry.name} | {cells} |"
    if own not in times.milliseconds:
        return f"{start} | | |"
    ratio, spent = times.ratio((entry.runtime, FLOAT), own).median, times.spread(own).median / batch
    return f"{start} {(entry.size or 0) / 1e6:.2f} | {spent:.2f} | {ratio:.2f} |"


@app.command(help=__doc__)
def main(
    fixtures: Annotated[Path | None, typer.Option(help="trained models and images, see accuracy.py")] = None,
    model: Annotated[str, typer.Option(help="of the fixtures")] = "deit_tiny_p8_64",
    images: Annotated[int, typer.Option(min=1, help="labelled images")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="images at a time, of the latency")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="of every file")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="of all files in turn")] = 15,
    without: Annotated[list[Other], typer.Option(help="not used though installed, repeatable")] = [],  # noqa: B006
) -> None:
    """Print one Markdown table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    given, used = material(fixtures, model, images), {own for own in Other if find_spec(own.value)} - {*without}
    with tempfile.TemporaryDirectory() as name:
        rows = list(entries(given, Path(name), threads, batch, used))
        expected = answers(no_gradients(given.network), given)
        cells = [figures(entry, given, expected) for entry in rows]
        timed = [entry for entry in rows if entry.runtime != PYTORCH]
        runs = {(entry.runtime, entry.name): partial(entry.run, given.images[:batch]) for entry in timed}
        times = in_turn(runs, rounds=rounds)
    print(
        f"\n{'digits' if fixtures is None else model}, {len(given.images)} images, batch {batch}, {threads} threads\n"
    )
    print(HEADER)
    for entry, found in zip(rows, cells, strict=True):
        print(row(entry, found, times, batch))


if __name__ == "__main__":
    app()
