"""Files that take images as they are decoded, uint8: the scaling that turns them into floats is part of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from torch import Tensor

from ptq4vit_fx import names
from ptq4vit_fx.errors import quoted
from ptq4vit_fx.export.contract import rewrite
from ptq4vit_fx.export.metadata import PROVENANCE_KEY, UINT8_KEY
from ptq4vit_fx.export.nodes import Array, add_constant, name_of
from ptq4vit_fx.export.preprocessing import recorded
from ptq4vit_fx.inputs.records import Place

#: Axes of a batch of images: as decoders give them, and as models take them.
Layout = Literal["nhwc", "nchw"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
WHITE = 255
UINT8 = "tensor(uint8)"


@dataclass(frozen=True)
class Pixels:
    """value = (pixel / 255 - mean) / std per channel, in float32 and in this order.

    These are the three roundings of torchvision's ToTensor and Normalize, which timm's transforms call. Folded into one
    multiplication and one addition, two values in three are another float32, by its last bits, and a value that lies
    between two codes may be given the other one.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Layout

    def fit(self, inputs: Sequence[Tensor | Array]) -> bool:
        """Return whether inputs are one batch of float images, with as many channels as mean and std have."""
        if len(inputs) != 1 or inputs[0].ndim != 4:
            return False
        kind = inputs[0].dtype
        is_float = kind.is_floating_point if isinstance(kind, torch.dtype) else kind.kind == "f"
        return bool(is_float) and len(self.mean) in (1, inputs[0].shape[1])

    def values(self, pixels: Array) -> Tensor:
        """Return uint8 images, in this layout, as the model's (batch, channels, height, width) float32."""
        images = torch.from_numpy(np.ascontiguousarray(self._moved(pixels, back=True)))
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return images.to(torch.float32).div(WHITE).sub(mean).div(std)

    def pixels(self, values: Tensor) -> NDArray[np.uint8]:
        """Return the images, uint8 in this layout, that are nearest to (batch, channels, height, width) floats."""
        mean, std = (np.array(numbers).reshape(-1, 1, 1) for numbers in (self.mean, self.std))
        exact = (values.detach().cpu().numpy().astype(np.float64) * std + mean) * WHITE
        codes = np.nan_to_num(np.rint(exact)).clip(0, WHITE).astype(np.uint8)
        return np.ascontiguousarray(self._moved(codes, back=False))

    def _moved(self, images: Array, *, back: bool) -> Array:
        axes = (0, 3, 1, 2) if back else (0, 2, 3, 1)
        return images if self.layout == "nchw" else images.transpose(axes)

    def rounded(self, batches: list[tuple[Tensor, ...]]) -> tuple[list[tuple[Tensor, ...]], int]:
        """Return batches of one input with every image as its nearest pixels give it, and how many images changed."""
        found: list[tuple[Tensor, ...]] = []
        changed = 0
        for (images,) in batches:
            nearest = self.values(self.pixels(images)).to(images.device)
            changed += int((nearest != images).flatten(1).any(1).sum())
            found.append((nearest,))
        return found, changed


def pixels_of(session: InferenceSession, file: str, operation: str) -> Pixels | None:
    """Return how a file makes floats of its uint8 input, None of a file that takes something else.

    Raises PTQError on a file whose metadata does not say it.
    """
    entries, said = session.get_inputs(), session.get_modelmeta().custom_metadata_map
    if len(entries) != 1 or entries[0].type != UINT8 or UINT8_KEY not in said:
        return None
    return _read(said, file, operation)


def image_shape(session: InferenceSession, pixels: Pixels | None) -> list[int | str | None]:
    """Return the shape of the first input in the order of a model: the batch, channels, height, width."""
    shape = list(session.get_inputs()[0].shape)
    nhwc = pixels is not None and pixels.layout == "nhwc" and len(shape) == 4
    return [shape[0], shape[3], *shape[1:3]] if nhwc else shape


def _read(said: Mapping[str, str], file: str, operation: str) -> Pixels:
    config, layout = recorded(said, file, operation), said[UINT8_KEY]
    place = Place(operation, file)
    if layout not in LAYOUTS:
        raise place.at(UINT8_KEY).refusal(" or ".join(LAYOUTS), quoted(layout))
    if config is None:
        raise place.at(PROVENANCE_KEY).refusal("the preprocessing of its pixels", "none")
    return Pixels(config["mean"], config["std"], "nhwc" if layout == "nhwc" else "nchw")


@rewrite(nothing="a file has an input")
def take_uint8(model: ir.Model, pixels: Pixels) -> int:
    """Let a file take uint8 images under the name of its input, and compute that input from them, in place."""
    graph, old = model.graph, model.graph.inputs[0]
    assert old.shape is not None
    name, taken = name_of(old), _names(model)
    batch, *inner = old.shape
    shape = ir.Shape([batch, *inner] if pixels.layout == "nchw" else [batch, *inner[1:], inner[0]])
    image = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=shape)
    nodes: list[ir.Node] = []

    def put(kind: str, dtype: ir.DataType, constant: tuple[str, Array] | None = None, **attributes: Any) -> None:
        number = sum(node.op_type == kind for node in nodes)
        inputs = [nodes[-1].outputs[0] if nodes else image]
        if constant is not None:
            inputs.append(add_constant(model, _free(names.variant(name, constant[0]), taken), constant[1]))
        out = ir.Value(name=_free(names.variant(name, len(nodes)), taken), type=ir.TensorType(dtype), shape=old.shape)
        label = _free(names.node(name, kind, number), taken)
        nodes.append(ir.node(kind, inputs, attributes, outputs=[out], name=label))

    if pixels.layout == "nhwc":
        put("Transpose", ir.DataType.UINT8, perm=[0, 3, 1, 2])  # of bytes, a quarter of what floats are
    put("Cast", ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    mean, std = (np.array(numbers, np.float32).reshape(-1, 1, 1) for numbers in (pixels.mean, pixels.std))
    put("Div", ir.DataType.FLOAT, ("white", np.array(WHITE, np.float32)))
    put("Sub", ir.DataType.FLOAT, ("mean", mean))
    put("Div", ir.DataType.FLOAT, ("std", std))
    old.replace_all_uses_with(nodes[-1].outputs[0], replace_graph_outputs=True)
    graph.inputs[0] = image
    first = graph[0]
    graph.insert_before(first, nodes)
    return 1


def _names(model: ir.Model) -> set[str]:
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return {name_of(named) for named in (*graph, *values)}


def _free(name: str, taken: set[str]) -> str:
    """Return a name that nothing of the file has yet, and take it."""
    while name in taken:
        name = names.variant(name, "pixels")
    taken.add(name)
    return name
