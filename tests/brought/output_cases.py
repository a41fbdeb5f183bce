"""What models return: mappings, dataclasses, tuples, tables, scalars, integers."""

from __future__ import annotations

import tempfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, pipeline, vit
from ptq4vit_fx.passes.graph.outputs import tensor_outputs


class Returning(nn.Module):
    """A ViT whose features (batch, tokens, 48) and logits (batch, 7) `collect` makes an output of."""

    def __init__(self, collect: Callable[[Returning, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net = vit()
        self.boxes = nn.Linear(48, 4)
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("anchors", torch.arange(6.0).reshape(3, 2))
        self.collect = collect

    def forward(self, x: Tensor) -> Any:
        features = self.net.forward_features(x)
        return self.collect(self, x, features, self.net.forward_head(features))


def first_logits(output: Any) -> Tensor:
    """A loss of whatever is called logits, or comes first."""
    outputs = tensor_outputs(output)
    return outputs.get("logits", next(iter(outputs.values()))).square().sum()


def names_in_file(converted: GraphModule, images: Tensor, **arguments: Any) -> dict[str, list[Any]]:
    """Return the outputs of a file of this model with their shapes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ptq.export_onnx(converted, path, images[:1], **arguments)
        return {entry.name: entry.shape for entry in onnxruntime.InferenceSession(path).get_outputs()}


def returns(collect: Callable[[Returning, Tensor, Tensor, Tensor], Any], names: list[str]) -> GraphModule:
    """Take such a model the whole way; the graph, and the file, have these outputs."""
    images = pictures()
    converted = pipeline(Returning(collect).eval(), images, loss=first_logits)
    assert list(tensor_outputs(converted(images))) == names
    assert list(names_in_file(converted, images)) == names
    return converted


@brought("model", "a detector with logits and boxes", quick=True)
def logits_and_boxes() -> None:
    converted = returns(
        lambda m, x, f, y: {"logits": y, "pred_boxes": m.boxes(f).sigmoid(), "loss": None}, ["logits", "pred_boxes"]
    )
    shapes = names_in_file(converted, pictures())
    assert shapes == {"logits": ["batch", 7], "pred_boxes": ["batch", 17, 4]}
    assert list(names_in_file(converted, pictures(), output_names=["pred_boxes"])) == ["pred_boxes"]
    assert list(names_in_file(converted, pictures(), output_names=["a", "b"])) == ["a", "b"]


@brought("model", "an output that is a dictionary of one tensor")
def one_entry() -> None:
    returns(lambda m, x, f, y: OrderedDict(out=y), ["out"])


@brought("model", "dictionaries and lists inside of a dictionary")
def nested() -> None:
    names = ["logits", "hidden_states.0", "hidden_states.1", "aux.boxes"]
    returns(lambda m, x, f, y: {"logits": y, "hidden_states": (f, f[:, 0]), "aux": {"boxes": m.boxes(f)}}, names)


@dataclass
class Detection:
    logits: Tensor
    boxes: Tensor
    loss: Tensor | None = None


@brought("model", "an output that is a dataclass", quick=True)
def a_dataclass() -> None:
    returns(lambda m, x, f, y: Detection(y, m.boxes(f)), ["logits", "boxes"])


Pair = namedtuple("Pair", ["features", "logits"])


@brought("model", "an output that is a named tuple")
def a_named_tuple() -> None:
    returns(lambda m, x, f, y: Pair(f, y), ["features", "logits"])


@brought("model", "a tuple of logits and a list of features")
def a_tuple() -> None:
    returns(lambda m, x, f, y: (y, [f, f[:, 0]]), ["output_0", "output_1", "output_2"])


@brought("model", "the values and indices of topk")
def topk() -> None:
    images = pictures()
    converted = pipeline(Returning(lambda m, x, f, y: y.topk(1)).eval(), images, loss=first_logits, int8_cosine=-1)
    assert list(names_in_file(converted, images)) == ["output_0", "output_1"]


@brought("model", "constant and scalar outputs: a table, a scale", quick=True)
def constants() -> None:
    names = ["logits", "scale", "raw_scale", "anchors", "positions", "total"]
    returns(
        lambda m, x, f, y: {
            "logits": y,
            "scale": m.scale.exp(),
            "raw_scale": m.scale,
            "anchors": m.anchors,
            "positions": m.net.pos_embed * 2,
            "total": y.abs().sum(),
        },
        names,
    )


@brought("model", "integer and boolean outputs")
def integers() -> None:
    returns(lambda m, x, f, y: {"logits": y, "best": y.argmax(1), "sure": y > 0}, ["logits", "best", "sure"])


@brought("model", "the same output twice, and the input as an output")
def repeated() -> None:
    converted = returns(lambda m, x, f, y: (y, y, x, y), ["output_0", "output_1", "output_2", "output_3"])
    assert list(names_in_file(converted, pictures(), output_names=["output_3", "output_0"])) == ["output_3", "output_0"]


@brought("model", "outputs called like a parameter, a layer and the input")
def taken_names() -> None:
    names = ["boxes.weight", "scale", "linear", "image"]
    images = pictures()
    model = Returning(lambda m, x, f, y: {names[0]: y, names[1]: y * m.scale, names[2]: m.boxes(f), names[3]: f})
    converted = pipeline(model.eval(), images, loss=first_logits)
    assert list(names_in_file(converted, images)) == [*names[:3], "image_output"]


@brought("model", "a number and None beside the logits")
def numbers() -> None:
    returns(lambda m, x, f, y: {"logits": y, "temperature": 0.5, "size": x.shape[-1], "past": None}, ["logits"])


@brought("model", "objects among the outputs: left out, with a warning")
def objects() -> None:
    returns(lambda m, x, f, y: {"logits": y, "cache": object(), "f": f}, ["logits", "f"])


class Instances:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


@brought("model", "an output that is an object of the model's own class", refused="an object of Instances")
def an_object() -> None:
    pipeline(Returning(lambda m, x, f, y: Instances(y)).eval(), pictures())


@brought("file", "a file of a fixed batch, checked on a number of images that it does not divide", quick=True)
def fixed_batch() -> None:
    images = pictures(7)
    model = Returning(lambda m, x, f, y: {"logits": y, "anchors": m.anchors})
    prepared = ptq.prepare_fx(model.eval(), ptq.recipes.ptq4vit().with_search(n=10, rounds=1), images[:1])
    ptq.calibrate(prepared, images, loss=first_logits, progress=False)
    converted = ptq.convert_fx(prepared)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ptq.export_onnx(converted, path, images[:1], batch=4)
        report = ptq.verify_onnx(path, converted, images)
    assert report.images == 7
    assert report.simulation.cosine > 0.999
    assert set(report.outputs) == {"logits", "anchors"}
    assert report.outputs["anchors"].bit_equal == 1


@brought(
    "task", "a complex output", refused="output spectrum: expected real numbers, as ONNX has them, got torch.complex64"
)
def complex_output() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = vit()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"scores": logits, "spectrum": torch.fft.rfft(logits)}

    images = pictures()
    prepared = ptq.prepare_fx(Spectrum().eval(), QUICK, images[:1])
    ptq.calibrate(prepared, images, progress=False, loss=lambda output: output["scores"].square().sum())
    converted = ptq.convert_fx(prepared)
    with tempfile.TemporaryDirectory() as folder:
        ptq.export_onnx(converted, Path(folder) / "scores.onnx", images[:1], output_names=["scores"])
        ptq.export_onnx(converted, Path(folder) / "all.onnx", images[:1])
