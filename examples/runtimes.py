"""How the examples that compare run a file in each runtime, and how they have NNCF write one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ptq4vit_fx.export.proof.latency import Opened
from ptq4vit_fx.export.proof.openvino_runtime import FLOAT32

#: A quantized model as somebody runs it: images, float32 (images, channels, height, width), to logits.
Run = Callable[[Tensor], Any]


def in_onnxruntime(path: Path, threads: int) -> Run:
    """Return a function that runs the file in ONNX Runtime, whose threads sleep while another file runs."""
    session = Opened.of(str(path), threads).session
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})[0]


def in_openvino(path: Path, threads: int) -> Run:
    """Return a function that runs the file, ONNX or OpenVINO's own, in its CPU plugin, float parts in float32."""
    import openvino

    settings = FLOAT32 | {"INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: compiled(images.numpy())[0]


def write_nncf(folder: Path, images: Tensor) -> Path:
    """Let NNCF quantize float.onnx of a folder for OpenVINO, as it advises for transformers; return the new file."""
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "float.onnx")
    data = nncf.Dataset([image[None].numpy() for image in images])
    quantized = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
    openvino.save_model(quantized, folder / "NNCF.xml", compress_to_fp16=False)
    return folder / "NNCF.xml"
