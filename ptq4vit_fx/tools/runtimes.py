"""Which flags of `ptq4vit quantize` belong to which runtime: `ptq4vit targets` prints it, docs/targets.md has it."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

#: What the table says where nothing is to be added to the command.
DEFAULT = "none"


@dataclass(frozen=True)
class Runtime:
    """A runtime and its machine; the flags of quantize, "" where none helps; what one should know."""

    name: str
    flags: str
    note: str


RUNTIMES = (
    Runtime("ONNX Runtime, x86 with VNNI or AMX", DEFAULT, "The default target. `--twins uniform` has no twin left."),
    Runtime(
        "ONNX Runtime, x86 with AVX2 alone",
        "--target onnxruntime-avx2",
        "Without VNNI the default file saturates and loses accuracy. `--w-bits 7` is the other way.",
    ),
    Runtime("ONNX Runtime, ARM", "--target onnxruntime-arm", "int8 activations, for ARM's dot product instructions."),
    Runtime(
        "OpenVINO",
        "--target openvino",
        "Do not give it the default file, in which it finds no integer products: slower there than float.",
    ),
    Runtime(
        "Browser: onnxruntime-web",
        DEFAULT,
        "WebAssembly, the default target; figures and a page in docs/browser.md. Not its WebGPU provider.",
    ),
    Runtime("Node: onnxruntime-node", DEFAULT, "As ONNX Runtime on the same CPU: take the flags of that row."),
    Runtime(
        "optimum, transformers.js",
        "--layout huggingface",
        "A folder with its configs and onnx/model_quantized.onnx. Add the flags of the CPU.",
    ),
    Runtime(
        "TensorRT",
        "--target tensorrt --recipe tensorrt --file-batch 8",
        "On GPUs int8 ViTs are usually no faster than fp16; measured by others: NVIDIA/TensorRT issue 4273 (A100, "
        "V100, A10), NVIDIA/Model-Optimizer issue 167 (T4). Time fp16 first. Files are checked by rules, not run here.",
    ),
    Runtime(
        "ONNX Runtime on CUDA",
        "",
        "Use fp16: int8 is TensorRT's matter on NVIDIA's GPUs. Not tried here.",
    ),
    Runtime("DirectML", "--target generic", "Plain QDQ of standard operators; not tried here. Time fp16 first."),
    Runtime(
        "QNN (Qualcomm)",
        "--target generic --twins uniform --file-batch 1",
        "Not tried here. Its NPU takes fixed shapes and wants every tensor quantized; files of this package keep "
        "norms, softmax and residuals in float, so that parts of the model will run on the CPU.",
    ),
    Runtime("CoreML, TFLite", "", "Not from here: their own converters start from PyTorch, none reads this ONNX."),
)


#: Target -> the runtime that its file is for, and what to do for another one that somebody may have in mind.
MADE_FOR = {
    "onnxruntime": "ONNX Runtime, x86; slower than float in OpenVINO: --target openvino",
    "onnxruntime-avx2": "ONNX Runtime, x86 without VNNI; with VNNI or AMX leave --target out",
    "onnxruntime-arm": "ONNX Runtime on ARM; on x86 leave --target out",
    "openvino": "OpenVINO; for ONNX Runtime leave --target out",
    "tensorrt": "TensorRT; for CPUs leave --target tensorrt and its --recipe out",
    "generic": "plain QDQ; ONNX Runtime, OpenVINO, TensorRT have their own targets",
}


def made_for(target: str) -> str:
    """Return which runtime the file of a target is for, and which option another one needs."""
    return MADE_FOR.get(target, "see `ptq4vit targets`")


def as_text(width: int = 80) -> str:
    """Return the table for a terminal: a runtime, its flags and the note below, in lines of at most `width`."""
    blocks = []
    for runtime in RUNTIMES:
        note = textwrap.fill(runtime.note, width - 4, initial_indent="    ", subsequent_indent="    ")
        blocks.append(f"{runtime.name}\n  {runtime.flags or '(no file from here)'}\n{note}")
    return "\n".join(["Add to `ptq4vit quantize MODEL --data FOLDER --out PATH`:", *blocks])


def as_dict() -> dict[str, Any]:
    """Return the table, JSON-ready."""
    return {"runtimes": [asdict(runtime) for runtime in RUNTIMES], "made_for": MADE_FOR}


def as_markdown() -> str:
    """Return the table as docs/targets.md has it."""
    rows = []
    for runtime in RUNTIMES:
        flags = f"`{runtime.flags}`" if runtime.flags.startswith("--") else runtime.flags or "no file from here"
        rows.append(f"| {runtime.name} | {flags} | {runtime.note} |")
    return "\n".join(["| runtime | flags of `quantize` | |", "|---|---|---|", *rows])
