"""What `ptq4vit quantize` is asked for, and what of it can be refused before the download and the minutes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from ptq4vit_fx.errors import check_extra, failure, unknown_name, warn
from ptq4vit_fx.export.contract import check_weights_alone
from ptq4vit_fx.export.onnx_export import check_target
from ptq4vit_fx.export.proof.against_float import KINDS, Kind
from ptq4vit_fx.export.targets import TARGETS
from ptq4vit_fx.files import check_writable
from ptq4vit_fx.inputs.sizes import bytes_of
from ptq4vit_fx.qconfig import QConfigMapping
from ptq4vit_fx.quantizers import FLOAT_BITS
from ptq4vit_fx.tools.devices import check_device
from ptq4vit_fx.tools.image_options import ImageOptions
from ptq4vit_fx.tools.layouts import Destination
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tools.tuned_request import check_tuning

#: What torch takes as a seed.
SEEDS = range(-(2**63), 2**64)


@dataclass(frozen=True)
class Request:
    """What `ptq4vit quantize` is asked for, by the names of its options; mapping: of recipe, twins and bits.

    batch_size: images per forward of the calibration; batch: the only number of images that the file takes.
    memory_limit: bytes. bench: measure the file beside the float file. report: a page to write; command: what was
    typed, for that page. kind: what the output is, None for `compare_float` to decide. settings: what `--set` says,
    which is in the mapping. agreement: with float, which `tune` keeps while it makes `minimize` small, by `timings` of
    a file or of this CPU. image_options: what of the preprocessing is to be another than the model's.
    scheduler: address of the Dask scheduler whose workers calibrate.
    """

    model: str
    data: Path
    destination: Destination
    mapping: QConfigMapping
    weights: Path | None
    weights_entry: str | None
    ema: bool | None
    model_args: tuple[str, ...]
    recipe: str
    twins: str
    w_bits: int
    a_bits: int
    images: int
    batch_size: int
    target: str
    opset: int
    batch: int | None
    seed: int
    loss: str | None
    checkpoint: Path | None
    memory_limit: int | None
    skip: tuple[str, ...]
    float_onnx: str | None
    kind: Kind | None
    bench: bool
    report: str | None
    command: str
    device: str = "cpu"
    sequential: bool = False
    scheduler: str | None = None
    settings: tuple[str, ...] = ()
    agreement: float | None = None
    minimize: str = "time"
    timings: Path | None = None
    image_options: ImageOptions = field(default_factory=ImageOptions)

    @property
    def tunes(self) -> bool:
        """Whether forms of products are chosen on images that calibration does not take."""
        return self.agreement is not None or self.twins == "auto"

    def asked(self) -> Asked:
        """Return the float model that is asked for."""
        return Asked(self.model, self.weights, self.weights_entry, self.ema, self.model_args)


def batch_of_calibration(images: int, old: int | None) -> int:
    """Return --calibration-batch; old: by the name that it had, which one may take for that of the file's batch."""
    if old is None:
        return images
    warn(
        f"quantize: --batch-size {old}: read as --calibration-batch {old}, images per forward of the calibration; a "
        f"file that takes batches of {old} alone is --file-batch {old}"
    )
    return old


def gibibytes(text: str | None) -> int | None:
    """Return the bytes of --memory-limit, a number of GiB or one with its unit; raises PTQError on anything else."""
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        return bytes_of(text, "quantize", "--memory-limit")
    if not 0 < number < math.inf:
        do = "leave it out for half of what is free"
        raise failure("quantize", "--memory-limit", expected="GiB above 0", got=f"{number:g}", do=do)
    return round(number * 2**30)


def check_request(request: Request) -> None:
    """Raise PTQError on options that exclude each other, and on paths that cannot be written."""
    _check_paths(request)
    if request.weights_entry is not None and request.weights is None:
        do = "add --weights FILE, or leave it out"
        raise failure("quantize", "--weights-entry", expected="a file that it is an entry of", got="none", do=do)
    if request.ema is not None and (request.weights is None or request.weights_entry is not None):
        option = "--ema" if request.ema else "--no-ema"
        got, do = (
            ("none", "add --weights FILE") if request.weights is None else ("--weights-entry", "leave one of them out")
        )
        raise failure("quantize", option, expected="a file of weights to choose in", got=got, do=do)
    if request.seed not in SEEDS:
        do = "choose a smaller number"
        raise failure("quantize", "--seed", expected="an integer of 64 bits", got=str(request.seed), do=do)
    if request.kind is not None and request.kind not in KINDS:
        raise unknown_name("quantize", "--output-kind", request.kind, KINDS)
    check_target(request.target, request.opset, request.batch)
    check_device(request.device)
    check_tuning(request)
    if request.target == "tensorrt" and request.recipe in ("best", "ptq4vit"):
        expected, do = "tensorrt or base with the target tensorrt", "add --recipe tensorrt"
        raise failure("quantize", "--recipe", expected=expected, got=repr(request.recipe), do=do)
    if request.sequential and request.scheduler is not None:
        expected, do = "products that can be searched apart", "leave --sequential or --scheduler out"
        raise failure("quantize", "--scheduler", expected=expected, got="--sequential", do=do)
    alone = [f"--a-bits {request.a_bits}"] if request.a_bits == FLOAT_BITS else []
    alone += [f"--set {change.pattern}=a{change.a}" for change in request.mapping.changes if change.a == FLOAT_BITS]
    for asked in alone[:1]:
        check_weights_alone(TARGETS[request.target], asked, "quantize")
    narrow = [change for change in request.mapping.changes if change.a not in (None, 8)]
    if request.target == "tensorrt" and narrow:
        expected, do = "8 bits of activations with the target tensorrt", "set those of weights alone"
        raise failure("quantize", f"--set {narrow[0].pattern}", expected=expected, got=f"a{narrow[0].a}", do=do)


def _check_paths(request: Request) -> None:
    """Raise PTQError if a file cannot be written, or if two options name the same one."""
    request.destination.check()
    if request.report is not None:
        check_extra("quantize", "--report", "report", "matplotlib")
    written = {
        "--out": request.destination.file,
        "--checkpoint": request.checkpoint,
        "--float-onnx": request.float_onnx,
        "--report": request.report,
    }
    read = {"--weights": request.weights, "--timings": request.timings}
    taken: dict[str, str] = {}
    for option, path in (written | read).items():
        if path is None:
            continue
        if option in written and option != "--out" and not request.destination.holds(path):
            check_writable(path, f"quantize {option}")
        name = os.path.realpath(path)
        if name in taken:
            do = "give each its own path"
            raise failure("quantize", option, expected=f"another file than {taken[name]}", got=str(path), do=do)
        taken[name] = option
