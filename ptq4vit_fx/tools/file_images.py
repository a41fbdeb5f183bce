"""What an ONNX file takes: images of how many channels, and the preprocessing that it records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnxruntime

from ptq4vit_fx.data.image_files import MODES
from ptq4vit_fx.data.preprocessing import at_size
from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.pixels import image_shape, pixels_of
from ptq4vit_fx.export.preprocessing import recorded
from ptq4vit_fx.export.proof.outputs import fixed_batch
from ptq4vit_fx.inputs.sizes import COPIES, FLOAT_BYTES, check_memory
from ptq4vit_fx.tools.image_options import ImageOptions
from ptq4vit_fx.tools.named.kinds import load_model
from ptq4vit_fx.tools.named.model import Asked

#: Pictures become pixels as the file says.
AS_RECORDED = ImageOptions()
#: What to do of a file without that record.
ADVICE = {
    "eval": "pass --model with the timm model that it was made from, or --mean and --std",
    "report": "pass images in Python: ptq.report(file, data=images)",
    "verify": "pass --model with the timm model that it was made from, or call verify_onnx in Python",
}


def preprocessing_of_file(
    session: onnxruntime.InferenceSession,
    file: Path,
    model: str | None,
    operation: str = "eval",
    options: ImageOptions = AS_RECORDED,
) -> dict[str, Any]:
    """Return timm's data config, at the input size of the file. Raises PTQError if neither file nor model says it.

    options: what of it is to be another.
    """
    if model is not None:
        config = load_model(Asked(model, pretrained=False)).preprocessing
    else:
        properties = session.get_modelmeta().custom_metadata_map
        known = recorded(properties, str(file))
        if known is None and options.mean is not None and options.std is not None:
            known = {"mean": options.mean, "std": options.std, "interpolation": "bicubic"}
        if known is None:
            raise failure(
                operation,
                str(file),
                expected="a file that records its preprocessing, as `ptq4vit quantize` writes it",
                got="no such record",
                do=ADVICE[operation],
            )
        config = known
    pixels = pixels_of(session, str(file), operation)
    if pixels is not None:  # a file that scales its images itself does so by its own numbers
        if options.mean is not None or options.std is not None:
            do = "leave --mean and --std out"
            raise failure(operation, str(file), expected="a file of float images", got="one that scales itself", do=do)
        config = config | {"mean": pixels.mean, "std": pixels.std}
    size: Any = tuple(image_shape(session, pixels)[1:])
    return options.applied(at_size(config, size))


def image_channels(session: onnxruntime.InferenceSession, file: Path, operation: str) -> int:
    """Return the channels of the only input, an image batch; raises PTQError if it is something else.

    Also on images that are too large for the memory.
    """
    shapes = [entry.shape for entry in session.get_inputs()]
    if len(shapes) == 1:
        shapes = [image_shape(session, pixels_of(session, str(file), operation))]
    sides = [side for shape in shapes for side in shape[2:] if isinstance(side, int) and side > 0]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in MODES or len(sides) != 2:
        expected = "a file of one input, images (batch, 1 or 3 channels, height, width)"
        do = "measure other models in Python"
        raise failure(operation, str(file), expected=expected, got=" and ".join(map(str, shapes)), do=do)
    fixed_batch(operation, str(file), session)
    size = COPIES * FLOAT_BYTES * math.prod(shapes[0][1:])
    check_memory(operation, str(file), size, what=f"an image of {sides[0]} x {sides[1]} pixels", do="pass another file")
    return int(shapes[0][1])
