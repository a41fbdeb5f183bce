"""`compare_float`: a quantized model, converted or written to a file, beside the float model, on images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import onnxruntime
import torch
from torch import nn
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure, foreign
from ptq4vit_fx.export.metadata import own_outputs
from ptq4vit_fx.export.pixels import image_shape, pixels_of
from ptq4vit_fx.export.proof.against_float import AgainstFloat, Kind
from ptq4vit_fx.export.proof.float_figures import Array, against_float
from ptq4vit_fx.export.proof.outputs import fixed_batch, outputs_of_file, outputs_of_model
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.inputs.batches import FIXED_BATCH, batches_of
from ptq4vit_fx.inputs.items import Input, model_inputs
from ptq4vit_fx.inputs.progress import Show, counted, show_nothing
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.float_model import float_model
from ptq4vit_fx.passes.graph.model_call import call_of
from ptq4vit_fx.passes.graph.model_copy import float_copy
from ptq4vit_fx.passes.graph.running import run
from ptq4vit_fx.passes.graph.silence import silence
from ptq4vit_fx.passes.graph.staged_model import model_at
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.torch_state import independent_of_caller

OPERATION, PASS = "compare_float", "pass the converted model, or its ONNX file"
#: ONNX Runtime's spelling of the types that images, masks and positions have.
TYPES = {
    **{"tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16},
    **{"tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(uint8)": torch.uint8},
    **{"tensor(int8)": torch.int8, "tensor(bool)": torch.bool},
}


@independent_of_caller()
def compare_float(
    quantized: GraphModule | str | os.PathLike[str],
    reference: nn.Module | str | os.PathLike[str],
    data: Any,
    *,
    kind: Kind | None = None,
    images: int | None = None,
    names: Sequence[str] = (),
    unseen: bool | None = None,
    progress: Show = show_nothing,
) -> AgainstFloat:
    """Run a quantized model and the float model on the same images; return how far they are apart.

    quantized: a converted model, or an ONNX file, which runs in ONNX Runtime. reference: the float model, which is
    copied and runs in PyTorch in evaluation mode, or its ONNX file. data, images: as for `calibrate`; take images that
    calibration has not seen (`unseen` says so in the report). names: of the images, for the report. kind: "classes",
    "embeddings" or "values", what the output is; by default the model's own `num_classes` decides where it has one
    (timm: 0 for embeddings), else names and shapes (`AgainstFloat.decided` says which).
    progress: is called with what is under way.

    Raises PTQError on files that cannot be read or run, on outputs that are not float's, and on images that do not fit.
    """
    wanted, fixed = inputs_of(quantized, reference)
    batches = batches_of(wanted, data, OPERATION, images=images, fixed=fixed)
    count = sum(len(batch[0]) for batch in batches)
    own = counted(batches, progress, "compare with float: the file", count)
    actual = _outputs(quantized, own, wanted, None)
    others = counted(batches, progress, "compare with float: float", count)
    expected = _outputs(reference, others, wanted, list(actual))
    if not set(actual) <= set(expected):
        if len(actual) != len(expected):
            do = "compare it with the model that it was made from"
            got = ", ".join(expected)
            raise failure(OPERATION, "reference", expected=f"outputs {', '.join(actual)}", got=got, do=do)
        expected = dict(zip(actual, expected.values(), strict=True))
    width = {name: x.shape[-1] for name, x in actual.items()}
    says = _says(reference, set(width.values())) or _says(quantized, set(width.values()))
    return against_float(expected, actual, kind=kind, says=says, names=names, unseen=unseen)


def _says(model: Any, widths: set[int]) -> str | None:
    """Return what a model says that its output is, by its `num_classes`; None if it does not, or says another width."""
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, bool) or not isinstance(classes, int):
        return None
    return "embeddings" if classes == 0 else "classes" if classes in widths else None


def _outputs(model: Any, batches: Iterable[Inputs], wanted: Sequence[Input], own: list[str] | None) -> dict[str, Array]:
    """Return name -> (images, ...) of what a model or a file gives; own: the names that a file's are to have."""
    if isinstance(model, (str, os.PathLike)):
        path, session = os.fspath(model), open_session(model)
        return outputs_of_file(path, session, batches, own or _names(path, session), OPERATION)
    if own is None:
        converted = model_at(Stage.CONVERTED, model, OPERATION, PASS)
        device = next((buffer.device for buffer in converted.buffers()), torch.device("cpu"))
        return outputs_of_model(lambda *inputs: run(converted, inputs, OPERATION), batches, device)
    copied = float_copy(float_model(model))
    names = [entry.parameter for entry in wanted] if len(wanted) > 1 else None
    call = call_of(copied, len(wanted), names)
    device = next((parameter.device for parameter in copied.parameters()), torch.device("cpu"))
    do = "run the float model on these images and mend what it raises"
    with silence(), foreign(OPERATION, type(model).__name__, expected="a forward that runs on these images", do=do):
        return outputs_of_model(lambda *inputs: call(copied, *inputs), batches, device)


def _names(path: str, session: onnxruntime.InferenceSession) -> list[str]:
    """Return the names of a file's outputs in the model that it was made from, as far as it says them."""
    said = own_outputs(session.get_modelmeta().custom_metadata_map, OPERATION, path)
    found = [entry.name for entry in session.get_outputs()]
    return [said.get(name, name) for name in found]


def inputs_of(quantized: Any, reference: Any = None) -> tuple[tuple[Input, ...], int | None]:
    """Return the inputs that both take, and the only batch size that a converted model takes.

    Raises PTQError if neither says its sizes: a converted model does, and a file that was written from one.
    """
    if not isinstance(quantized, (str, os.PathLike)):
        converted = model_at(Stage.CONVERTED, quantized, OPERATION, PASS)
        return model_inputs(converted), converted.meta.get(FIXED_BATCH)
    entries: tuple[Input, ...] = ()
    for file in (x for x in (quantized, reference) if isinstance(x, (str, os.PathLike))):
        session = open_session(file)
        fixed_batch(OPERATION, str(file), session)
        entries = tuple(
            Input(entry.name, entry.name, tuple(entry.shape[1:]), TYPES.get(entry.type, torch.float32))
            for entry in session.get_inputs()
        )
        pixels = pixels_of(session, str(file), OPERATION)
        if pixels is not None:  # it is given floats all the same: `run` makes the pixels of them that they were
            shape: Any = tuple(image_shape(session, pixels)[1:])
            entries = (replace(entries[0], shape=shape, dtype=torch.float32),)
        if all(isinstance(size, int) for entry in entries for size in entry.shape):
            return entries, None
    got, do = " and ".join(map(str, entries)), "export it again with fixed image sizes; the batch may stay dynamic"
    raise failure(OPERATION, os.fspath(quantized), expected="a file that says its image size", got=got, do=do)
