"""A small ViT, images, and the whole way from a model to a verified file, with a check of the values at every step."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import ptq4vit_fx as ptq

#: Searches of a tenth of a second: what is asked is whether it works, not how well.
QUICK = ptq.recipes.ptq4vit().with_search(n=10, rounds=1)

#: Relative difference of the prepared from the float model; float32 sums of a few thousand terms in another order.
FLOAT_DIFFERENCE = 1e-3
#: Cosine of the int8 with the float outputs, all outputs of an image side by side, for random weights.
INT8_COSINE = 0.97
#: Cosine of the file with the simulation: the kernels differ in the last bit, and a code may flip.
FILE_COSINE = 0.999


def vit(**arguments: Any) -> Any:
    """Return timm's ViT of two blocks for 32 pixels, seven classes, with weights large enough to matter."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7} | arguments
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return model


def pictures(count: int = 6, *size: int, seed: int = 1) -> Tensor:
    """Return random images (count, 3, 32, 32), or of another size per image."""
    return torch.randn(count, *(size or (3, 32, 32)), generator=torch.Generator().manual_seed(seed))


def sum_of_squares(output: Any) -> Tensor:
    """A loss for outputs that are no logits."""
    return torch.stack(
        [x.square().sum() for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    ).sum()


def _ragged(images: tuple[Tensor, ...]) -> list[Any]:
    cut = (2 * len(images[0]) + 2) // 3
    batches = [tuple(x[:cut] for x in images), tuple(x[cut:] for x in images)]
    return [batch if len(batch) > 1 else batch[0] for batch in batches if len(batch[0])]


def pipeline(
    model: nn.Module,
    images: Tensor | tuple[Tensor, ...],
    *,
    example: Any = None,
    data: Any = None,
    loss: str | Callable[[Any], Any] = "pseudo_label",
    reference: Callable[..., Any] | None = None,
    batch: int | None = None,
    int8_cosine: float = INT8_COSINE,
    **prepare_arguments: Any,
) -> GraphModule:
    """Take a model through prepare, calibrate, convert, export and verify; return the converted model.

    images: what one forward is given, several images at once. example: what `prepare_fx` is given, by default the first
    image. data: what `calibrate` is given, by default the images in two batches,
    of which the last is the smaller one. reference: what computes the right outputs, by
    default the model. batch: the fixed batch of the file; then every image runs by itself.
    """
    images = images if isinstance(images, tuple) else (images,)
    first = tuple(x[:1] for x in images)
    example = (first if len(first) > 1 else first[0]) if example is None else example
    data = _ragged(images) if data is None else data
    with torch.no_grad():
        expected = (reference or model)(*images)
    prepared = ptq.prepare_fx(model, QUICK, example, **prepare_arguments)
    with torch.no_grad():
        assert relative_difference(prepared(*images), expected) < FLOAT_DIFFERENCE, "the prepared model is another one"
    ptq.calibrate(prepared, data, loss=loss, progress=False)
    converted = ptq.convert_fx(prepared)
    with torch.no_grad():
        simulated = converted(*images)
    assert cosine(simulated, expected) > int8_cosine, "the int8 model is far from the float model"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ptq.export_onnx(converted, path, example, batch=batch)
        parity = ptq.verify_onnx(path, converted, data)
        assert parity.simulation.cosine > FILE_COSINE, "verify_onnx: the file is far from the simulation"
        assert cosine(run_file(path, images, batch), simulated) > FILE_COSINE, "the file is far from the simulation"
    return converted


def run_file(path: Path, images: tuple[Tensor, ...], batch: int | None) -> list[Tensor]:
    """Return the outputs of ONNX Runtime, its inputs fed in their order."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    parts: Iterable[tuple[Tensor, ...]] = zip(*(x.split(batch or len(x)) for x in images), strict=True)
    outputs = [session.run(None, {n: x.numpy() for n, x in zip(names, part, strict=True)}) for part in parts]
    return [torch.from_numpy(np.concatenate(arrays) if batch else arrays[0]) for arrays in zip(*outputs, strict=True)]


def relative_difference(output: Any, expected: Any) -> float:
    """Return the largest difference of two outputs, relative to the largest value of the expected one."""
    actual, right = side_by_side(output), side_by_side(expected)
    assert actual.shape == right.shape, f"{tuple(actual.shape)} values, expected {tuple(right.shape)}"
    return float((actual - right).abs().max() / right.abs().max().clamp_min(1e-12))


def cosine(output: Any, expected: Any) -> float:
    """Return the smallest cosine of two outputs over the images."""
    actual, right = side_by_side(output), side_by_side(expected)
    assert actual.shape == right.shape, f"{tuple(actual.shape)} values, expected {tuple(right.shape)}"
    return float(torch.cosine_similarity(actual, right, dim=1).min())


def side_by_side(output: Any) -> Tensor:
    """Return the float tensors of an output that have a batch, side by side: (images, values)."""
    if dataclasses.is_dataclass(output):  # transformers' outputs too, of which the keys leave out what is None
        output = dict(output) if isinstance(output, Mapping) else vars(output)
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    images = max(len(x) for x in tensors if x.ndim)
    return torch.cat([x.float().reshape(images, -1) for x in tensors if x.ndim and len(x) == images], dim=1)
