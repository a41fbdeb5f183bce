"""`export_onnx`: the converted graph as a QDQ ONNX file of standard operators."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure, unknown_name
from ptq4vit_fx.export import metadata
from ptq4vit_fx.export.contract import Rewrite, run_steps
from ptq4vit_fx.export.description import Description, describe
from ptq4vit_fx.export.float_types import compute_in_float32
from ptq4vit_fx.export.interface import (
    Interface,
    compute_outputs,
    interface_of,
    name_interface,
    return_results,
    working_names,
)
from ptq4vit_fx.export.model_files import tensors_of, write_model
from ptq4vit_fx.export.naming import name_nodes, own_head_scales, own_parameters
from ptq4vit_fx.export.opsets import (
    LOWEST_OPSET,
    drop_saturate,
    newest_opset,
    to_file_format,
    to_opset,
    translated_opset,
)
from ptq4vit_fx.export.pixels import take_uint8
from ptq4vit_fx.export.targets import TARGETS, Target
from ptq4vit_fx.export.translate import translate
from ptq4vit_fx.files import check_writable
from ptq4vit_fx.inputs.batches import example_for
from ptq4vit_fx.names import holder, tensor
from ptq4vit_fx.passes.graph.contract import calibration_of, on_cpu, plan_of
from ptq4vit_fx.passes.graph.dataflow import get_attribute
from ptq4vit_fx.passes.graph.staged_model import model_at
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.write_qdq import write_qdq
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import UniformParams
from ptq4vit_fx.torch_state import independent_of_caller
from ptq4vit_fx.views.tabular import Tabular

#: What every file gets before the steps of its target, in this order.
STEPS = (
    compute_outputs,  # in front of the names: it adds nodes
    name_interface,  # in front of what looks for other tensors by name
    name_nodes,  # first of the steps that know sites: all that follows finds them by the names of nodes
    own_head_scales,  # while a division still stands in front of its quantizer, whose site it is named after
    own_parameters,  # before types and scales change: equal constants are one, and a change would meet them all
    drop_saturate,  # before the opset: 17 has no such attribute
    to_opset,  # before the target, whose steps spell what they add for the opset that the file has
    to_file_format,  # behind the opset, whose format it is
    compute_in_float32,  # behind both, of which it depends what a runtime has
)


@dataclass(frozen=True, repr=False)
class ExportReport(Tabular):
    """What was written: path, size in bytes (with the data file), size of the float weights, node counts, sites.

    rewrites: every step on the way from the exporter's graph to this file, what it did, or why there was nothing to do.
    outputs: their names in the file.
    """

    path: Path
    bytes: int
    float_bytes: int
    operators: dict[str, int]
    sites: int
    opset: int
    target: str
    rewrites: tuple[Rewrite, ...] = ()
    outputs: tuple[str, ...] = ()

    def brief(self) -> str:
        """Return the path and what it takes."""
        return f"{self.path}, {self.bytes / 1e6:.2f} MB, opset {self.opset}, target {self.target}, {self.sites} sites"

    def records(self) -> list[dict[str, Any]]:
        """Return how many nodes of each operator the file has."""
        return [{"operator": name, "nodes": count} for name, count in sorted(self.operators.items())]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.operators.items()))
        return (
            f"{self.path}: {self.bytes / 1e6:.2f} MB ({self.bytes / self.float_bytes:.0%} of the float weights), "
            f"opset {self.opset}, target {self.target}, {self.sites} quantized operands; {counts}"
        )


@independent_of_caller()
def export_onnx(
    converted: GraphModule,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    target: str = "onnxruntime",
    opset: int = 20,
    batch: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    labels: Sequence[str] | Mapping[Any, str] | None = None,
    uint8_input: str | None = None,
) -> ExportReport:
    """Write a converted model to an ONNX file with int8 weights; return what was written.

    example_inputs: as for `prepare_fx`, of the size that the model was prepared for, any batch size.
    target: a name in `ptq4vit_fx.export.targets.TARGETS` (docs/targets.md). opset: 17 to the newest that onnx knows.
    batch: a fixed number of images; the default is a dynamic batch. input_names: by default `image`, or the parameters'
    names if there are several. output_names: the model's own names of the outputs that the file is to have, in any
    order, or a new name for each; by default it has all of them: `logits` if there is one, the keys of a mapping (keys
    of keys as `aux.boxes`), output_0, output_1 ... of a tuple. Numbers are left out, with a warning.
    preprocessing: how images become the input, as `timm.data.resolve_model_data_config(model)` says it (mean and std at
    least); labels: the name of each class, in their order or by number. Both stand in the file, for those who have
    nothing else: `ptq4vit eval` and examples/classify_onnxruntime.py read them. uint8_input: "nhwc" or "nchw": the file
    takes uint8 images, resized and cropped, and scales them itself, bit for bit as the preprocessing does.

    Every node is named after the module that it comes from, `blocks/0/attn/...`; Q/DQ nodes carry their site. The plan,
    the recipe and search settings, the library version and the calibration's fingerprint are in the file's metadata.
    Weights above 2 GB lie in `<name>.data` beside the file. Raises PTQError if the model is not converted, if the
    target cannot hold it or is not known, if the opset is not supported, if names are missing or repeat, or if the path
    is not writable; nothing is left behind then.
    """
    converted = on_cpu(model_at(Stage.CONVERTED, converted, "export_onnx", "call convert_fx(prepared) first"))
    rules = check_target(target, opset, batch)
    interface = interface_of(converted, input_names, output_names)
    inputs = tuple(x.cpu() for x in example_for(converted, example_inputs, "export_onnx"))
    described = describe(converted, inputs, interface, preprocessing, labels, uint8_input)
    check_writable(path, "export_onnx")  # before the work, not after
    qdq = return_results(write_qdq(converted), list(interface.outputs))
    model = translate(qdq, inputs, translated_opset(opset), batch, working_names(interface))
    plan = plan_of(converted)
    # Pixels last: what other steps look for starts at floats.
    steps = (*STEPS, *rules.steps, *((take_uint8,) if described.pixels else ()))
    known = {"plan": plan, "opset": opset, "interface": interface, "pixels": described.pixels}
    rewrites = run_steps(model, steps, **known)
    rules.check(model)
    _add_metadata(model, converted, target, interface, described)
    size = write_model(model, path, "export_onnx")
    counts = dict(Counter(node.op_type for node in model.graph))
    float_bytes = sum(4 * tensor.size for tensor in tensors_of(model))
    outputs = tuple(interface.outputs.values())
    return ExportReport(Path(path), size, float_bytes, counts, len(plan.grids), opset, target, rewrites, outputs)


def check_target(target: str, opset: int, batch: int | None) -> Target:
    """Return the target of that name; raises PTQError if `export_onnx` would refuse one of its arguments."""
    if target not in TARGETS:
        raise unknown_name("export_onnx", "target", target, TARGETS)
    if not LOWEST_OPSET <= opset <= newest_opset():
        expected = f"{LOWEST_OPSET} to {newest_opset()}"
        raise failure("export_onnx", "opset", expected=expected, got=str(opset), do="use 20, the default")
    if batch is not None and batch < 1:
        do = "leave it out for a dynamic batch"
        raise failure("export_onnx", "batch", expected="1 or more", got=str(batch), do=do)
    return TARGETS[target]


def _add_metadata(
    model: ir.Model, converted: GraphModule, target: str, interface: Interface, described: Description
) -> None:
    calibration, plan = calibration_of(converted), plan_of(converted)
    assert calibration is not None  # convert_fx refuses a model without
    provenance = dict(calibration.provenance)
    if described.preprocessing is not None:
        provenance["preprocessing"] = described.preprocessing
    values = {
        metadata.PLAN_KEY: plan.to_json(),
        metadata.RECIPE_KEY: json.dumps({"recipe": plan.recipe, "searches": _searches(plan)}),
        metadata.VERSION_KEY: version("ptq4vit-fx"),
        metadata.CALIBRATION_KEY: calibration.fingerprint(),
        metadata.PROVENANCE_KEY: json.dumps(provenance),
        metadata.TARGET_KEY: target,
        metadata.OUTPUTS_KEY: json.dumps({name: own for own, name in interface.outputs.items()}),
        metadata.FIGURES_KEY: metadata.encode_figures(calibration.distances, calibration.shares, calibration.snr),
        metadata.SCALES_KEY: json.dumps(_scales_elsewhere(model, converted)),
        **described.entries(),
    }
    metadata.write_metadata(model, values)


def _scales_elsewhere(model: ir.Model, converted: GraphModule) -> dict[str, str]:
    """Return site -> calibrated scales, encoded, of the sites of whose scales the file has no tensor.

    Scales per head are divided out in front of a quantizer of scale 1, often in the weights of a projection
    (fold_head_scales.py), whose own scales are then others too. A target may hold a weight in parts.
    """
    calibration = calibration_of(converted)
    assert calibration is not None
    elsewhere = {}
    for site, params in calibration.params.items():
        if isinstance(params, UniformParams):
            in_graph = get_attribute(converted, tensor(holder(site), "scale"))
            if tensor(site, "scale") not in model.graph.initializers or not torch.equal(in_graph, params.scale):
                elsewhere[site] = metadata.encode_scales(params.scale.numpy())
    return elsewhere


def _searches(plan: QuantPlan) -> list[dict[str, object]]:
    """Return every search setting once, with the products that it was used for."""
    products: dict[str, list[str]] = {}
    for name, settings in plan.searches.items():
        products.setdefault(json.dumps(asdict(settings)), []).append(name)
    return [{"settings": json.loads(settings), "products": names} for settings, names in products.items()]
