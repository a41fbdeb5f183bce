"""Files and models as functions from images to what they give; which of their outputs are logits or embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from ptq4vit_fx.errors import failure, foreign
from ptq4vit_fx.export.proof.float_figures import EMBEDDINGS
from ptq4vit_fx.export.proof.outputs import as_array, fixed_batch, run
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.passes.graph.outputs import LOGITS, logits_in, plain_outputs, tensor_outputs
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tools.remade import float_network

Array = NDArray[Any]
#: Images (images, channels, height, width) float32 -> name of each output -> (images, ...).
Runs = Callable[[Array], Mapping[str, Array]]
#: What a backbone of transformers gives that was saved without a pooler.
TOKENS = "last_hidden_state"


def file_outputs(session: onnxruntime.InferenceSession, file: Path) -> Runs:
    """Return what runs an open file; raises PTQError, when it runs, on outputs that are not one entry per image."""
    names, fixed = [entry.name for entry in session.get_outputs()], fixed_batch("eval", str(file), session)

    def outputs(pixels: Array) -> dict[str, Array]:
        # A file of a fixed batch takes no other: repeat the last image, drop its results.
        pieces = [pixels] if fixed is None else [pixels[i : i + fixed] for i in range(0, len(pixels), fixed)]
        found: dict[str, list[Array]] = {name: [] for name in names}
        for piece in pieces:
            full = _filled(piece, fixed)
            for name, result in zip(names, run("eval", str(file), session, [full]), strict=True):
                if not result.ndim or len(result) != len(full):
                    expected, do = f"logits ({len(full)} images, classes)", "pass a file that classifies images"
                    raise failure("eval", str(file), expected=expected, got=f"{result.shape}", do=do)
                found[name].append(result[: len(piece)])
        return {name: np.concatenate(results) for name, results in found.items()}

    return outputs


def _filled(pixels: Array, size: int | None) -> Array:
    return np.concatenate([pixels, pixels[-1:].repeat(size - len(pixels), 0)]) if size else pixels


def is_file(against: str) -> bool:
    """Return whether a float model is named by its file, not by a model's name."""
    return against.endswith(".onnx") or os.path.isfile(against)


def float_outputs(asked: Asked, file: Path) -> Runs:
    """Return what runs the float model: an ONNX file, or a model by name, as for `quantize`.

    file: the one that it is compared with, which says how the model was built. Raises PTQError on a file that cannot be
    read and on a name that is unknown.
    """
    against = asked.name
    if is_file(against):
        if len(asked.origin()) > 1:
            expected, do = "a model's name with --weights or --model-arg", "leave these out: the file holds its weights"
            raise failure("eval", "--against", expected=expected, got=f"the file {against}", do=do)
        return file_outputs(open_session(against), Path(against))
    model = float_network("eval", file, asked)

    def outputs(pixels: Array) -> dict[str, Array]:
        expected, do = "a model that runs on these images", "pass --model-arg as quantize had it, or the float file"
        with torch.inference_mode(), foreign("eval", f"--against {against}", expected=expected, do=do):
            given = tensor_outputs(plain_outputs(model(torch.from_numpy(pixels))))
        return {name: as_array(x) for name, x in given.items()}

    return outputs


def embedding_in(outputs: Mapping[str, Any], kind: str | None) -> str | None:
    """Return the name of the output that is an embedding, None if classes are what counts.

    kind: what the output is, as the user or the file says it; else names say it. outputs: name -> array of its shape.
    """
    if kind == "classes":
        return None
    named = [name for name in outputs if name.rpartition(".")[2] in EMBEDDINGS]
    logits = logits_in(outputs)
    if kind is None and (LOGITS in outputs or (logits is not None and logits not in named)):
        return None
    tokens = [name for name in outputs if name.rpartition(".")[2] == TOKENS]
    given = [*named, *([logits] if logits is not None else []), *tokens]
    return next(iter(given if kind is None else (*given, *reversed(list(outputs)))), None)


def logits_of(outputs: Mapping[str, Array], subject: str) -> Array:
    """Return the logits, (images, classes); raises PTQError on outputs without any."""
    name = logits_in(outputs)
    if name is None:
        do = "measure other models in Python, or say --output-kind embeddings"
        raise failure("eval", subject, expected="an output `logits`", got=", ".join(outputs), do=do)
    logits = outputs[name]
    if logits.ndim != 2 or not logits.shape[1]:
        expected, do = f"logits ({len(logits)} images, classes)", "pass a file that classifies images"
        raise failure("eval", subject, expected=expected, got=f"{logits.shape}", do=do)
    return logits
