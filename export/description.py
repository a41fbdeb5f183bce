"""What a file says of what goes in and what comes out, for whoever has the file alone: preprocessing, labels, uint8."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure, quoted
from ptq4vit_fx.export import metadata
from ptq4vit_fx.export.interface import Interface, results_of
from ptq4vit_fx.export.pixels import LAYOUTS, Layout, Pixels
from ptq4vit_fx.export.preprocessing import preprocessing_of
from ptq4vit_fx.inputs.records import Place, read_as
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.contract import calibration_of
from ptq4vit_fx.passes.graph.outputs import logits_in

EXPORT = "export_onnx"


@dataclass(frozen=True)
class Description:
    """preprocessing: timm's data config at the size of the file, None if it is not known. labels: a name per class, or
    none at all. pixels: how a file that takes uint8 makes floats of them, None of one that takes floats.
    """

    preprocessing: dict[str, Any] | None = None
    labels: tuple[str, ...] = ()
    pixels: Pixels | None = None

    def entries(self) -> dict[str, str]:
        """Return what stands in the metadata beside the provenance, which has the preprocessing."""
        found = {}
        if self.labels:
            found[metadata.LABELS_KEY] = json.dumps(self.labels)
        if self.pixels:
            found[metadata.UINT8_KEY] = self.pixels.layout
        return found


def describe(
    converted: GraphModule,
    inputs: Inputs,
    interface: Interface,
    preprocessing: Mapping[str, Any] | None,
    labels: Sequence[str] | Mapping[Any, str] | None,
    uint8_input: str | None,
) -> Description:
    """Return the description of a converted model's file; raises PTQError on arguments that do not fit the model.

    preprocessing: None for what the calibration says of it, as that of the command line does.
    """
    calibration, shapes = calibration_of(converted), [tuple(x.shape) for x in inputs]
    if preprocessing is None and uint8_input is not None and calibration is not None:
        preprocessing = calibration.provenance.get("preprocessing")
    found = None if preprocessing is None else preprocessing_of(preprocessing, shapes, EXPORT)
    named = () if labels is None else class_names(labels, _classes(converted, interface))
    return Description(found, named, _pixels(found, uint8_input, inputs))


def _pixels(preprocessing: dict[str, Any] | None, layout: str | None, inputs: Inputs) -> Pixels | None:
    if layout is None:
        return None
    if layout not in LAYOUTS:
        raise failure(EXPORT, "uint8_input", expected=" or ".join(LAYOUTS), got=quoted(layout), do="choose one")
    if preprocessing is None:
        do = "pass preprocessing=timm.data.resolve_model_data_config(model), or mean and std as a mapping"
        raise failure(EXPORT, "uint8_input", expected="mean and std of the preprocessing", got="none", do=do)
    if inputs[0].dtype != torch.float32:
        do = "leave uint8_input out"
        raise failure(EXPORT, "uint8_input", expected="a model of float images", got=str(inputs[0].dtype), do=do)
    return Pixels(tuple(preprocessing["mean"]), tuple(preprocessing["std"]), cast("Layout", layout))


def _classes(converted: GraphModule, interface: Interface) -> int:
    """Return the number of classes of a file; raises PTQError if none of its outputs is logits."""
    shapes = {name: result.value.shape for name, result in results_of(converted).items() if name in interface.outputs}
    name = logits_in({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    if name is None:
        got, do = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()), "leave labels out"
        raise failure(EXPORT, "labels", expected="a model with an output `logits`", got=got, do=do)
    return int(shapes[name][-1])


def class_names(labels: Sequence[str] | Mapping[Any, str], classes: int) -> tuple[str, ...]:
    """Return the name of each class, by its number; raises PTQError unless there is one for each, in text."""
    place = Place(EXPORT, "labels", do="pass a name for each class of the model, in their order")
    if isinstance(labels, Mapping):  # id2label of transformers, whose keys are text once they were JSON
        numbered = {str(key): name for key, name in labels.items()}
        labels = [numbered[str(number)] for number in range(len(numbered)) if str(number) in numbered]
    read: tuple[str, ...] = read_as(tuple[str, ...], labels, place)
    if len(read) != classes:
        raise place.refusal(f"{classes} names, one per class of the model", str(len(read)))
    return read
