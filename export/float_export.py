"""The float model as an ONNX file beside the quantized one: the same inputs and outputs, names and opset."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from torch import nn

from ptq4vit_fx.export import metadata
from ptq4vit_fx.export.contract import run_steps
from ptq4vit_fx.export.interface import compute_outputs, interface_of, name_interface, return_results, working_names
from ptq4vit_fx.export.model_files import write_model
from ptq4vit_fx.export.opsets import to_file_format, to_opset, translated_opset
from ptq4vit_fx.export.translate import translate
from ptq4vit_fx.files import check_writable
from ptq4vit_fx.inputs.example import example_of
from ptq4vit_fx.passes.graph.float_model import float_model
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.torch_state import independent_of_caller

OPERATION = "export_float"
STEPS = (compute_outputs, name_interface, to_opset, to_file_format)


@independent_of_caller()
def export_float(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    opset: int = 20,
    batch: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Write a float model to an ONNX file, as `export_onnx` does with the quantized one; return its bytes.

    example_inputs, opset, batch and names: as for `prepare_fx` and `export_onnx`. facts: JSON-ready, such as the
    preprocessing, for the file's metadata. Raises PTQError if the model cannot be traced or exported, or the path is
    not writable.
    """
    check_writable(path, OPERATION)
    model = float_model(model)
    example = example_of(model, example_inputs, OPERATION)
    traced = trace(model, example.tensors, (), example.names).cpu()
    interface = interface_of(traced, input_names, output_names)
    graph = return_results(traced, list(interface.outputs))
    inputs = tuple(x.cpu() for x in example.tensors)
    file = translate(graph, inputs, translated_opset(opset), batch, working_names(interface))
    run_steps(file, STEPS, opset=opset, interface=interface)
    values = {
        metadata.VERSION_KEY: version("ptq4vit-fx"),
        metadata.PROVENANCE_KEY: json.dumps(dict(facts or {})),
        metadata.OUTPUTS_KEY: json.dumps({name: own for own, name in interface.outputs.items()}),
    }
    metadata.write_metadata(file, values)
    return write_model(file, path, OPERATION)
