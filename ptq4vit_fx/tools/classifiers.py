"""Files and models as functions from images to logits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from ptq4vit_fx.errors import failure, foreign
from ptq4vit_fx.export.proof.outputs import as_array, fixed_batch, run
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.passes.graph.outputs import logits_in, plain_outputs, tensor_outputs
from ptq4vit_fx.tools.models import create_model

Array = NDArray[Any]
#: Images (images, channels, height, width) float32 -> logits (images, classes).
Classifier = Callable[[Array], Array]


def classifier_of(session: onnxruntime.InferenceSession, file: Path) -> Classifier:
    """Return what classifies with an open file; raises PTQError if it has no output that classes are read from."""
    found = {entry.name: np.empty([0] * len(entry.shape)) for entry in session.get_outputs()}
    name, fixed = logits_in(found), fixed_batch("eval", str(file), session)
    if name is None:
        do = "export it with output_names= of that output alone"
        raise failure("eval", str(file), expected="an output `logits`", got=", ".join(found), do=do)
    output = list(found).index(name)

    def classify(pixels: Array) -> Array:
        # A file of a fixed batch takes no other: repeat the last image, drop its results.
        pieces = [pixels] if fixed is None else [pixels[i : i + fixed] for i in range(0, len(pixels), fixed)]
        full = [_filled(piece, fixed) for piece in pieces]
        results = [run("eval", str(file), session, [piece])[output] for piece in full]
        for logits, piece in zip(results, full, strict=True):
            if logits.ndim != 2 or len(logits) != len(piece) or not logits.shape[1]:
                expected, do = f"logits ({len(piece)} images, classes)", "pass a file that classifies images"
                raise failure("eval", str(file), expected=expected, got=f"{logits.shape}", do=do)
        return np.concatenate([logits[: len(piece)] for logits, piece in zip(results, pieces, strict=True)])

    return classify


def _filled(pixels: Array, size: int | None) -> Array:
    return np.concatenate([pixels, pixels[-1:].repeat(size - len(pixels), 0)]) if size else pixels


def is_file(against: str) -> bool:
    """Return whether a float model is named by its file, not as a timm model."""
    return against.endswith(".onnx") or os.path.exists(against) or os.sep in against


def float_classifier(against: str, weights: Path | None, entry: str | None, arguments: Sequence[str]) -> Classifier:
    """Return what classifies with the float model: an ONNX file, or a timm model by name.

    weights, entry, arguments: of a timm model, as for `create_model`. Raises PTQError on a file that cannot be read and
    on a name that is unknown.
    """
    if is_file(against):
        if weights is not None or entry is not None or arguments:
            expected, do = "a timm model with --weights or --model-arg", "leave these out: the file holds its weights"
            raise failure("eval", "--against", expected=expected, got=f"the file {against}", do=do)
        return classifier_of(open_session(against), Path(against))
    model = create_model(against, weights, list(arguments), entry=entry)

    def classify(pixels: Array) -> Array:
        expected, do = "a model that runs on these images", "pass --model-arg as quantize had it, or the float file"
        with torch.inference_mode(), foreign("eval", f"--against {against}", expected=expected, do=do):
            outputs = tensor_outputs(plain_outputs(model(torch.from_numpy(pixels))))
        name = logits_in(outputs)
        if name is None:
            do = "compare other models in Python: compare_float(...)"
            raise failure("eval", f"--against {against}", expected="logits", got=", ".join(outputs), do=do)
        return as_array(outputs[name])

    return classify
