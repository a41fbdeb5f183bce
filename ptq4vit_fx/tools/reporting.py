"""`ptq4vit report`, and the page at the end of `ptq4vit quantize`: files, folders and models by name in, a page out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ptq4vit_fx.data.pictures import short_name
from ptq4vit_fx.errors import check_extra, failure
from ptq4vit_fx.export.proof.operator_times import OperatorTimes
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.export.report.collect import is_calibration, report
from ptq4vit_fx.export.report.content import Known, Report
from ptq4vit_fx.files import check_writable
from ptq4vit_fx.tools.classifiers import is_file
from ptq4vit_fx.tools.file_images import image_channels, preprocessing_of_file
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tools.phases import MEASURE, READ, Phases
from ptq4vit_fx.tools.remade import float_network
from ptq4vit_fx.tools.some_images import some_images

if TYPE_CHECKING:
    from ptq4vit_fx.tools.request import Request
    from ptq4vit_fx.tools.summary import Summary


@dataclass(frozen=True)
class ReportRequest:
    """What `ptq4vit report` is asked for, by the names of its options; against: the float model, of no name: none."""

    subject: str
    out: str
    data: Path | None
    against: Asked
    calibration: Path | None
    images: int
    bench: bool


def report_on(request: ReportRequest, phases: Phases) -> Report:
    """Write the page; return what it says. Raises PTQError on anything that cannot be read, fitted or written."""
    check_extra("report", "the page", "report", "matplotlib")
    check_writable(request.out, "report --out")
    reference = request.against
    if len(reference.origin()) > 1 and (not reference.name or is_file(reference.name)):
        expected, do = "a model's name in --against", "leave out --weights, --weights-entry, --ema and --model-arg"
        raise failure("report", "options", expected=expected, got=reference.name or "none", do=do)
    if is_calibration(request.subject):
        return report(
            request.subject,
            request.out,
            calibration=request.calibration,
            data=request.data,
            reference=reference.name or None,
        )
    with phases(READ):
        pixels, names = _images(request)
    with phases(MEASURE):
        return report(
            request.subject,
            request.out,
            calibration=request.calibration,
            data=pixels,
            reference=_float_model(reference, request.subject),
            names=names,
            bench=request.bench,
        )


def _images(request: ReportRequest) -> tuple[Tensor | None, Sequence[str]]:
    """Return the images of --data as the file wants them, and what each is called there; None without any."""
    if request.data is None:
        return None, ()
    file = Path(request.subject)
    session = open_session(file)
    image_channels(session, file, "report")
    config = preprocessing_of_file(session, file, None, "report")
    pictures, pixels = some_images("report", request.data, config, request.images)
    return pixels, [short_name(picture, request.data) for picture in pictures]


def _float_model(asked: Asked, file: str) -> nn.Module | str | None:
    if not asked.name or is_file(asked.name):
        return asked.name or None
    return float_network("report", Path(file), asked)


def report_of_summary(summary: Summary, float_times: OperatorTimes | None, pixels: Tensor, request: Request) -> Report:
    """Write the page of what `quantize` has just written, with all that it knows. pixels: for histograms."""
    known = Known(
        against=summary.against,
        latency=summary.latency,
        float_times=float_times,
        float_bytes=summary.float_bytes,
        warnings=(*summary.complaints(), *summary.warnings),
        next=summary.next_commands(),
        command=request.command,
        why=summary.why_no_latency,
    )
    return report(summary.exported.path, request.report, data=pixels, bench=request.bench, known=known)
