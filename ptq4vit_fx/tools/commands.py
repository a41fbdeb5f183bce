"""The commands beside quantize, eval and inspect: each is its options and one call; cli.py makes commands of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ptq4vit_fx.tools import options
from ptq4vit_fx.tools.options import AsJson
from ptq4vit_fx.tools.terminal import FAILED, console, readable_errors, say, say_json, showing

Quiet = Annotated[bool, typer.Option("--quiet", help="print warnings and errors alone")]


def bench(
    file: Annotated[Path, typer.Argument(help="ONNX file")],
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|MODEL", help="ONNX file, or model as for quantize, to time beside, repeatable"),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="of each file (default: the runtime chooses)")] = 0,
    batch: Annotated[int | None, typer.Option(min=1, help="images at a time (default: one)")] = None,
    rounds: Annotated[int | None, typer.Option(min=2, help="of all files in turn (default: 5 to 50)")] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="onnxruntime or openvino, repeatable (default: what is installed)")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="time onnxruntime's quantize_static of the float file too")
    ] = False,
    model_arg: Annotated[list[str] | None, typer.Option(help="of the model in --against, as for quantize")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Time an ONNX file on this machine, beside float and others, in ONNX Runtime and OpenVINO."""
    with readable_errors():
        phases = showing(not (quiet or as_json))
        from ptq4vit_fx.tools.bench import BenchRequest, bench_file

        request = BenchRequest(
            file=file,
            against=tuple(against or ()),
            threads=threads,
            batch=batch,
            rounds=rounds,
            runtime=tuple(runtime or ()),
            static=static,
            model_args=tuple(model_arg or ()),
        )
        report = bench_file(request, phases)
        if as_json:
            say_json(report.to_dict())
        elif quiet:
            say("\n".join(report.verdict()))
        else:
            say(report)


def report(
    subject: Annotated[str, typer.Argument(metavar="FILE|CALIBRATION", help="ONNX file of quantize, or a calibration")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="PATH", help="HTML page to write")],
    data: Annotated[Path | None, typer.Option(help="images, as for quantize: values at every site; agreement")] = None,
    against: options.Against = None,
    weights: options.AgainstWeights = None,
    weights_entry: options.AgainstEntry = None,
    ema: options.AgainstEma = None,
    model_arg: options.AgainstArg = None,
    calibration: Annotated[Path | None, typer.Option(help="that of the file, for figures that it lacks")] = None,
    images: Annotated[int, typer.Option(min=1, help="images of --data, evenly spread")] = 64,
    bench: Annotated[bool, typer.Option(help="time the operators of the file")] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page of what is known of a file or a calibration: costs, histograms, agreement, times."""
    with readable_errors():
        phases = showing(not (quiet or as_json))
        from ptq4vit_fx.tools.named.model import Asked
        from ptq4vit_fx.tools.reporting import ReportRequest, report_on

        reference = Asked(against or "", weights, weights_entry, ema, tuple(model_arg or ()))
        request = ReportRequest(subject, out, data, reference, calibration, images, bench)
        found = report_on(request, phases)
        if as_json:
            say_json(found.to_dict())
        elif not quiet:
            say("\n".join(found.lines(out)))


def verify(
    file: Annotated[Path, typer.Argument(help="ONNX file of quantize")],
    data: Annotated[Path, typer.Option(help="images, as for quantize")],
    runtime: Annotated[
        str, typer.Option(help="onnxruntime, openvino, or web: onnxruntime-web, WebAssembly in node")
    ] = "onnxruntime",
    calibration: Annotated[
        Path | None, typer.Option(help="that of the file (--checkpoint of quantize): compare with its simulation")
    ] = None,
    model: Annotated[str | None, typer.Option(help="that it is of, as for quantize (default: the file says)")] = None,
    weights: Annotated[Path | None, typer.Option(help="of that model, as for quantize")] = None,
    weights_entry: Annotated[str | None, typer.Option(help="as for quantize")] = None,
    model_arg: Annotated[list[str] | None, typer.Option(help="as for quantize")] = None,
    images: Annotated[int, typer.Option(min=1, help="of --data, evenly spread")] = 32,
    layers: Annotated[int, typer.Option(min=0, help="images on which the codes of every site are compared")] = 8,
    npm: Annotated[Path, typer.Option(help="folder where onnxruntime-web is installed, for web")] = Path(),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare a file with its simulation, or what a runtime makes of it with ONNX Runtime: outputs, codes site by site.

    Without a calibration, onnxruntime is compared with the file as it is written, every node by itself.
    """
    with readable_errors():
        phases = showing(not (quiet or as_json))
        from ptq4vit_fx.tools.remade import Named
        from ptq4vit_fx.tools.verifying import VerifyRequest, verify_file

        named = Named(model, weights, weights_entry, tuple(model_arg or ()))
        request = VerifyRequest(file, data, runtime, calibration, named, images, layers, npm)
        found = verify_file(request, phases)
        if as_json:
            say_json(found.to_dict())
        elif not quiet:
            say(found, highlight=False)
        if not found.ok:
            raise found.refusal()


def targets(as_json: AsJson = False) -> None:
    """Print which flags of quantize belong to which runtime."""
    from ptq4vit_fx.tools.runtimes import as_dict, as_text

    if as_json:
        say_json(as_dict())
    else:
        say(as_text(min(console.width, 100)), highlight=False)


def demo(
    out: Annotated[Path, typer.Option(help="folder for the ONNX files and the picture")] = Path("out"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Quantize the embedded digits ViT at 8, 6 and 4 bits with both recipes; needs no network."""
    shown = not (quiet or as_json)
    with readable_errors():
        phases = showing(shown)
        from ptq4vit_fx.tools.demo import run_demo

        found = run_demo(out, phases)
        if as_json:
            say_json(found.to_dict())
        elif shown:
            console.print(found.table())
            say(f"picture: {found.picture}")


def coverage(
    family: Annotated[list[str] | None, typer.Option(help="family to try, repeatable (default: all)")] = None,
    out: Annotated[Path, typer.Option(help="folder for coverage.md and coverage.json")] = Path("out"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Take a model of every family, random weights, through tracing, quantization, export and ONNX Runtime."""
    with readable_errors():
        from ptq4vit_fx.tools.coverage import run_coverage
        from ptq4vit_fx.tools.families import FAMILIES, find_family

        families = [find_family(name) for name in family] if family else FAMILIES
        rows = run_coverage(families, out, say if not (quiet or as_json) else lambda line: None)
        if as_json:
            say_json({"families": [asdict(row) for row in rows]})
    if any(row.problem for row in rows):
        raise typer.Exit(FAILED)
