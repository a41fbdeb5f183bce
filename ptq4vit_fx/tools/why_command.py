"""`ptq4vit why`: the model that a calibration or a file is of, prepared as it was, and asked where it loses."""

from __future__ import annotations

from pathlib import Path

from ptq4vit_fx.api import calibrate, load_calibration
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.tools.phases import CALIBRATE, READ, Phases
from ptq4vit_fx.tools.remade import Named, network_of, of_file
from ptq4vit_fx.tools.some_images import some_images
from ptq4vit_fx.tuning.mixing import model_of_plan
from ptq4vit_fx.tuning.why import Why, why

#: Images that the scales of a file are searched on again.
CALIBRATED = 32


def explain(
    file: Path,
    data: Path,
    named: Named,
    images: int,
    phases: Phases,
) -> Why:
    """Return where a quantized model loses.

    file: a calibration, or an ONNX file, whose scales are then searched again, as its plan says, on the first half of
    the images; the other half is measured on. phases: shows what is under way. Raises PTQError on anything
    else, and if nothing says what model it is.
    """
    calibration = None if file.suffix == ".onnx" else Calibration.load(file)
    plan, facts = (calibration.plan, calibration.provenance) if calibration is not None else of_file("why", file)
    network, preprocessing = network_of("why", file, facts, named)
    with phases(READ):
        count = images + (0 if calibration is not None else CALIBRATED)
        _, pixels = some_images("why", data, preprocessing, count)
    prepared = model_of_plan(network, plan, pixels[:1])
    if calibration is None:
        count = min(CALIBRATED, len(pixels) // 2)
        with phases(CALIBRATE):
            calibrate(prepared, pixels[:count], progress=phases.show)
        pixels = pixels[count:]
    else:
        load_calibration(prepared, calibration)
    with phases("measure products one by one"):
        return why(prepared, pixels)
