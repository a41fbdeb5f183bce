"""`export_huggingface`: a folder as Hugging Face's readers want it, optimum and transformers.js: ONNX file and configs.

What they read of it (optimum-onnx 0.1, transformers 4.57, @huggingface/transformers 4.3): `model_type` of config.json
finds the class, id2label the names; preprocessor_config.json the image processor; `onnx/model_quantized.onnx` is what
`dtype: "q8"` means, and `onnx/model.onnx` what "fp32" does; each takes `pixel_values` and gives `logits` or
`last_hidden_state`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.description import class_names
from ptq4vit_fx.export.interface import results_of
from ptq4vit_fx.export.model_card import model_card
from ptq4vit_fx.export.onnx_export import ExportReport, check_target, export_onnx
from ptq4vit_fx.export.preprocessing import preprocessing_of
from ptq4vit_fx.files import check_writable, make_folder, write_file
from ptq4vit_fx.inputs.batches import example_for
from ptq4vit_fx.passes.graph.contract import calibration_of, plan_of
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.outputs import LOGITS
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.staged_model import model_at
from ptq4vit_fx.passes.graph.stages import Stage

OPERATION = "export_huggingface"
FILE, FLOAT_FILE = Path("onnx", "model_quantized.onnx"), Path("onnx", "model.onnx")
PIXELS, HIDDEN = "pixel_values", "last_hidden_state"
#: The type of which every reader has a class for classes and one without; weights and layers are the file's own.
MODEL_TYPE = "vit"
#: Pillow's number of each interpolation, which image processors are given.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
#: What timm crops where a model does not say it.
CROP = 0.875


def export_huggingface(
    converted: GraphModule,
    folder: str | os.PathLike[str],
    example_inputs: Any,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    labels: Sequence[str] | Mapping[Any, str] | None = None,
    config: Mapping[str, Any] | None = None,
    figures: Mapping[str, str] | None = None,
    target: str = "onnxruntime",
    opset: int = 20,
    batch: int | None = None,
) -> ExportReport:
    """Write a converted model as a folder that optimum and transformers.js open; return what `export_onnx` returns.

    preprocessing: as for `export_onnx`; None for that of the calibration. labels: likewise, LABEL_0 ... without.
    config: entries of config.json in the place of ours, as `model.config.to_dict()` of transformers; by default the
    type is `vit` with the sizes of the model. figures: rows of the model card, name -> text. The others: as for
    `export_onnx`. Raises PTQError as it does, on a model of something else than three channels, on one that gives
    neither logits nor one other output, and on preprocessing that image processors do not know; nothing is left then.
    """
    converted = model_at(Stage.CONVERTED, converted, OPERATION, "call convert_fx(prepared) first")
    check_target(target, opset, batch)
    shapes = [tuple(x.shape) for x in example_for(converted, example_inputs, OPERATION)]
    found = _preprocessing(converted, preprocessing, shapes)
    processor = image_processor(found)
    name, output_names = _output(converted)
    written = Path(folder)
    with _folders(written):
        paths = [check_writable(written / leaf, OPERATION) for leaf in ("config.json", "preprocessor_config.json")]
        report = export_onnx(
            converted,
            written / FILE,
            example_inputs,
            target=target,
            opset=opset,
            batch=batch,
            input_names=[PIXELS],
            output_names=output_names,
            preprocessing=found,
            labels=labels,
        )
        settings = model_config(converted, shapes[0], name, labels) | dict(config or {})
        for path, content in zip(paths, (settings, processor), strict=True):
            write_file(path, f"{json.dumps(content, indent=2)}\n".encode(), OPERATION)
        write_card(written, report, figures or {})
    return report


def write_card(folder: Path, report: ExportReport, figures: Mapping[str, str]) -> None:
    """Write README.md, the model card, with these figures beside those of the report."""
    write_file(folder / "README.md", model_card(folder.resolve().name, report, figures).encode(), OPERATION)


def image_processor(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return preprocessor_config.json of timm's data config: resize, crop, rescale, normalize.

    CLIPImageProcessor, as the one that every reader has and that crops what it resized; its rescaling multiplies by
    1/255 where torchvision divides by 255, so that pixels differ in their last bit. Raises PTQError on what it cannot
    do: a border, a size that is no square, one channel.
    """
    channels, height, width = preprocessing["input_size"]
    mode = preprocessing.get("crop_mode") or "center"
    square = height == width
    if channels != 3 or mode == "border" or (mode == "center" and not square):
        got = f"{channels} channels" if channels != 3 else f"crop_mode {mode!r} at {height} x {width}"
        do = "write a file with export_onnx(preprocessing=), and prepare the images yourself"
        expected = "three channels, and a square that is cropped from the center, or squashed"
        raise failure(OPERATION, "preprocessing", expected=expected, got=got, do=do)
    sides = [math.floor(side / (preprocessing.get("crop_pct") or CROP)) for side in (height, width)]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": sides[0]} if mode == "center" else {"height": sides[0], "width": sides[1]},
        "resample": RESAMPLE[preprocessing["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _each(preprocessing["mean"], channels),
        "image_std": _each(preprocessing["std"], channels),
    }


def _each(numbers: Sequence[float], channels: int) -> list[float]:
    return list(numbers) if len(numbers) == channels else list(numbers) * channels


def model_config(
    converted: GraphModule, shape: tuple[int, ...], output: str, labels: Sequence[str] | Mapping[Any, str] | None
) -> dict[str, Any]:
    """Return config.json: a type that readers know, the sizes of the model, and its labels if it has classes."""
    _, channels, height, width = shape
    size: Any = height if height == width else [height, width]
    config = {"model_type": MODEL_TYPE, "image_size": size, "num_channels": channels, **_sizes(converted)}
    if output != LOGITS:
        return config | {"architectures": ["ViTModel"]}
    (logits,) = (result for name, result in results_of(converted).items() if name == LOGITS)
    classes = int(logits.value.shape[-1])
    given = [f"LABEL_{number}" for number in range(classes)] if labels is None else class_names(labels, classes)
    named = {str(number): name for number, name in enumerate(given)}
    last = {name: int(number) for number, name in named.items()}  # of names that repeat: the last one
    return config | {"architectures": ["ViTForImageClassification"], "id2label": named, "label2id": last}


def _sizes(converted: GraphModule) -> dict[str, int]:
    """Return the sizes of ViTConfig that can be seen in the graph: of the last block, where blocks differ."""
    sizes: dict[str, int] = {}
    attention = set[str]()
    ops = {op.name: op for op in plan_of(converted).ops}
    for node, name in planned_products(converted.graph):
        op, shape = ops.get(name), shape_of(node)
        if op is None or not shape:
            continue
        if op.kind == "conv2d":
            sizes.setdefault("patch_size", op.stride[0])
        elif op.kind == "matmul" and not op.rhs_is_weight and op.lhs_source == "softmax" and len(shape) == 4:
            attention.add(name)
            sizes |= {"num_hidden_layers": len(attention), "num_attention_heads": shape[1]}
        elif op.kind == "linear" and op.lhs_source not in (None, "softmax"):
            sizes |= {"hidden_size": shape[-1], "intermediate_size": shape_of(node.all_input_nodes[0])[-1]}
    return sizes


def _preprocessing(
    converted: GraphModule, preprocessing: Mapping[str, Any] | None, shapes: list[tuple[int, ...]]
) -> dict[str, Any]:
    calibration = calibration_of(converted)
    if preprocessing is None and calibration is not None:
        preprocessing = calibration.provenance.get("preprocessing")
    if preprocessing is None:
        do = "pass preprocessing=timm.data.resolve_model_data_config(model), or mean and std as a mapping"
        raise failure(OPERATION, "preprocessing", expected="that of the model", got="none", do=do)
    return preprocessing_of(preprocessing, shapes, OPERATION)


def _output(converted: GraphModule) -> tuple[str, list[str] | None]:
    """Return the name of the output that readers ask for, and `output_names` of `export_onnx` that give the file it."""
    shapes = {name: result.value.shape for name, result in results_of(converted).items()}
    name = LOGITS if len(shapes.get(LOGITS, ())) == 2 else HIDDEN
    if name in shapes or len(shapes) == 1:
        return name, [name]
    do = "return that tensor alone from forward"
    raise failure(OPERATION, "the model's outputs", expected=f"{LOGITS} or {HIDDEN}", got=", ".join(shapes), do=do)


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make the folders of a file, and take those that were not there away again if it cannot be written."""
    new = [path for path in (folder / FILE.parent, folder, *folder.parents) if not os.path.lexists(path)]
    try:
        make_folder(folder / FILE.parent, OPERATION)
        yield
    except BaseException:
        for path in new[-1:]:
            shutil.rmtree(path, ignore_errors=True)
        raise
