"""`ptq4vit verify`: a file beside its simulation, and in other runtimes beside ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptq4vit_fx.api import convert_fx, load_calibration
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import PTQError, failure, unknown_name
from ptq4vit_fx.export.metadata import CALIBRATION_KEY
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.proof.other_runtimes import ONNXRUNTIME, RUNTIMES, RuntimeReport, verify_runtime
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.export.proof.verify import VerifyReport, verify_onnx
from ptq4vit_fx.tools.file_images import image_channels, preprocessing_of_file
from ptq4vit_fx.tools.phases import CONVERT, READ, TRACE, VERIFY, Phases
from ptq4vit_fx.tools.remade import Named, network_of, of_file
from ptq4vit_fx.tools.some_images import some_images
from ptq4vit_fx.tuning.mixing import model_of_plan

#: Images at a time.
BATCH = 8


@dataclass(frozen=True)
class VerifyRequest:
    """What `ptq4vit verify` is asked for, by the names of its options; calibration: None for the file alone."""

    file: Path
    data: Path
    runtime: str = ONNXRUNTIME
    calibration: Path | None = None
    named: Named = field(default_factory=Named)
    images: int = 32
    layers: int = 8
    npm: Path = Path()


@dataclass(frozen=True)
class Verified:
    """The file beside its simulation, where there is a calibration, and the runtime beside what it is compared with."""

    file: Path
    simulation: VerifyReport | None
    runtime: RuntimeReport | None

    @property
    def ok(self) -> bool:
        return all(report.ok for report in (self.simulation, self.runtime) if report is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers behind the report, JSON-ready."""
        simulation, runtime = (
            None if report is None else report.to_dict() for report in (self.simulation, self.runtime)
        )
        return {"ok": self.ok, "simulation": simulation, "runtime": runtime}

    def __str__(self) -> str:
        return "\n".join(str(report) for report in (self.simulation, self.runtime) if report is not None)

    def refusal(self) -> PTQError:
        """Return the error of a file that does not compute what it should."""
        worse = next(report for report in (self.simulation, self.runtime) if report is not None and not report.ok)
        got = worse.same_functions if isinstance(worse, VerifyReport) else worse.comparison
        do = "see the first site that differs, and the traps, in the report"
        return failure("verify", str(self.file), expected="the same results on both sides", got=str(got), do=do)


def verify_file(request: VerifyRequest, phases: Phases) -> Verified:
    """Compare a file with the model and calibration that made it, and in another runtime with ONNX Runtime.

    phases: shows what is under way. Raises PTQError on a file, calibration, images or a runtime that cannot be had.
    """
    if request.runtime not in RUNTIMES:
        raise unknown_name("verify", "--runtime", request.runtime, RUNTIMES)
    session = open_session(request.file)
    image_channels(session, request.file, "verify")
    preprocessing = preprocessing_of_file(session, request.file, request.named.name, "verify")
    with phases(READ):
        _, pixels = some_images("verify", request.data, preprocessing, request.images)
    batches = list(torch.split(pixels, BATCH))
    simulation = runtime = None
    if request.calibration is not None:
        simulation = _simulated(request, request.calibration, batches, phases)
    if request.calibration is None or request.runtime != ONNXRUNTIME:
        with phases(f"verify in {request.runtime}"):
            known: dict[str, Any] = {"runtime": request.runtime, "layers": request.layers, "npm": request.npm}
            runtime = verify_runtime(request.file, [(x,) for x in batches], **known, progress=phases.show)
    return Verified(request.file, simulation, runtime)


def _simulated(
    request: VerifyRequest, calibration_file: Path, batches: list[torch.Tensor], phases: Phases
) -> VerifyReport:
    """Return the file beside the model that is made again of its name, its plan and its calibration."""
    calibration, file = Calibration.load(calibration_file), request.file
    _, facts = of_file("verify", file)
    said = load_file(file).metadata_props.get(CALIBRATION_KEY)
    if said != calibration.fingerprint():
        got, do = f"{calibration_file}, which is {calibration.fingerprint()}", "pass that of this file"
        raise failure("verify", str(file), expected=f"its calibration {said}", got=got, do=do)
    network, _ = network_of("verify", file, facts, request.named)
    with phases(TRACE):
        prepared = model_of_plan(network, calibration.plan, batches[0][:1])
    load_calibration(prepared, calibration)
    with phases(CONVERT):
        converted = convert_fx(prepared)
    with phases(VERIFY):
        return verify_onnx(file, converted, batches, layers=request.layers, progress=phases.show)
