"""Prepared and converted models as other objects are treated: copied, saved, moved, compiled."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, vit
from ptq4vit_fx.passes.graph.contract import history


def saved(model: GraphModule) -> GraphModule:
    """Return what torch.load makes of what torch.save made."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read: GraphModule = torch.load(file, weights_only=False)
    return read


def whole_way(through: Callable[[GraphModule], GraphModule]) -> None:
    """Take a prepared, a calibrated and a converted model through something; nothing that is known of them is lost."""
    images = pictures()
    prepared = through(ptq.prepare_fx(vit(), QUICK, images[:1]))
    calibration = ptq.calibrate(prepared, images, progress=False)
    expected = ptq.convert_fx(prepared)
    calibrated = through(prepared)
    assert calibrated.calibration.fingerprint() == calibration.fingerprint()  # type: ignore[operator, union-attr]
    converted = through(ptq.convert_fx(calibrated))
    assert [rewrite.name for rewrite in history(converted)] == [rewrite.name for rewrite in history(expected)]
    assert converted.plan == expected.plan
    with torch.no_grad():
        assert torch.equal(converted(images), expected(images))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ptq.export_onnx(converted, path, images[:1])
        report = ptq.verify_onnx(path, converted, images)
    assert report.same_functions.cosine > 0.9999
    assert not report.code_comparison.missing  # type: ignore[union-attr]


@brought("file", "prepared and converted models saved with torch.save and read again", quick=True)
def torch_save() -> None:
    whole_way(saved)


@brought("file", "prepared and converted models pickled")
def pickled() -> None:
    whole_way(lambda model: pickle.loads(pickle.dumps(model)))


@brought("file", "prepared and converted models copied, deeply and not")
def copied() -> None:
    whole_way(lambda model: copy.copy(copy.deepcopy(model)))


@brought("file", "prepared and converted models under torch.compile")
def compiled_stages() -> None:
    images = pictures()
    compiled_model: Any = partial(torch.compile, backend="eager")
    prepared: Any = ptq.prepare_fx(vit(), QUICK, images[:1])
    ptq.calibrate(compiled_model(prepared), images, progress=False)
    converted: Any = compiled_model(ptq.convert_fx(compiled_model(prepared)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ptq.export_onnx(converted, path, images[:1])
        assert ptq.verify_onnx(path, converted, images).simulation.cosine > 0.999


@brought("file", "a converted model in torch.export and torch.jit.trace")
def exported_by_the_user() -> None:
    images = pictures()
    converted = ptq.quantize(vit(), images, qconfig_mapping=QUICK, progress=False)
    with torch.no_grad():
        expected = converted(images)
        assert torch.equal(torch.export.export(converted, (images,)).module()(images), expected)
        assert torch.equal(torch.jit.trace(converted, images)(images), expected)


class Local(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = vit()

    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.net(x))


def _local() -> Callable[[Tensor], Tensor]:
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    return doubled


doubled = _local()
torch.fx.wrap("doubled")


@brought("file", "torch.save of a graph that calls a function without a name", refused="save: node doubled: expected")
def unnamed_function() -> None:
    saved(ptq.prepare_fx(Local().eval(), QUICK, pictures(1)))


@brought(
    "file",
    "verify_onnx with the float model",
    refused="verify_onnx: VisionTransformer: expected a model at stage 'converted'",
)
def verify_float() -> None:
    ptq.verify_onnx("model.onnx", vit(), pictures())  # type: ignore[arg-type]
