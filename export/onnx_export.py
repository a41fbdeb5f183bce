"""`export_onnx`: the converted graph as a QDQ ONNX file of standard operators."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ptq4vit_fx.batches import Inputs, example_tensors
from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.export.naming import name_nodes, own_parameters
from ptq4vit_fx.export.targets import TARGETS, Target
from ptq4vit_fx.files import atomic_path
from ptq4vit_fx.operators import DEQUANTIZE, QUANTIZE
from ptq4vit_fx.passes.contract import calibration_of, plan_of, stage_of
from ptq4vit_fx.passes.stages import Stage
from ptq4vit_fx.passes.write_qdq import write_qdq

#: Metadata keys of the ONNX file.
PLAN_KEY, VERSION_KEY, CALIBRATION_KEY, PROVENANCE_KEY, TARGET_KEY = (
    f"ptq4vit_fx.{name}" for name in ("plan", "version", "calibration", "provenance", "target")
)
BATCH_NORM = torch.ops.aten.batch_norm.default
AVERAGE_POOL = torch.ops.aten.adaptive_avg_pool2d.default
#: A protobuf file cannot be larger than this; bigger models keep their weights beside it.
PROTOBUF_LIMIT = 2**31 - 2**20


@dataclass(frozen=True)
class ExportReport:
    """What was written: path, size in bytes, size of the float weights, node counts by operator, sites."""

    path: Path
    bytes: int
    float_bytes: int
    operators: dict[str, int]
    sites: int
    opset: int
    target: str

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.operators.items()))
        return (
            f"{self.path}: {self.bytes / 1e6:.2f} MB ({self.bytes / self.float_bytes:.0%} of the float weights), "
            f"opset {self.opset}, target {self.target}, {self.sites} quantized operands; {counts}"
        )


def export_onnx(
    converted: GraphModule,
    path: str | os.PathLike[str],
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    target: str = "onnxruntime",
    opset: int = 20,
) -> ExportReport:
    """Write a converted model to an ONNX file with a dynamic batch and int8 weights; return what was written.

    example_inputs: an image batch of the size that the model accepts, any batch size; a tuple for several inputs.
    target: a name in `ptq4vit_fx.export.targets.TARGETS`. opset: 18 or newer. Every node is named after the module that
    it comes from, `blocks/0/attn/...`; Q/DQ nodes carry their site. The input is `image`, or has the parameter's name
    if there are several; the output is `logits`, or output_0, output_1 ... The plan, the library version and the
    calibration's fingerprint are in the file's metadata. Raises PTQError if the model is not converted, the target or
    opset is not supported, or the path is not writable; nothing is left behind then.
    """
    rules = _check(converted, target, opset)
    inputs = example_tensors(example_inputs, "export_onnx")
    with atomic_path(path, "export_onnx") as temporary:
        model = _to_onnx(write_qdq(copy.deepcopy(converted)), inputs, opset)
        name_nodes(model)
        own_parameters(model)
        model = rules.rewrite(model)
        rules.check(model)
        _add_metadata(model, converted, target)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, temporary)
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return ExportReport(
        Path(path),
        os.path.getsize(path),
        _float_bytes(model),
        counts,
        len(plan_of(converted).quantizers),
        opset,
        target,
    )


def _check(converted: GraphModule, target: str, opset: int) -> Target:
    stage = stage_of(converted) if isinstance(converted, GraphModule) else None
    if stage is not Stage.CONVERTED:
        raise failure(
            "export_onnx",
            type(converted).__name__,
            expected="a model from convert_fx or quantize",
            got=f"stage {stage.value!r}" if stage else "a model that this package did not convert",
            do="call convert_fx(prepared) first",
        )
    if target not in TARGETS:
        raise failure(
            "export_onnx",
            "target",
            expected=f"one of {', '.join(TARGETS)}",
            got=repr(target),
            do=f"did you mean {near_names(target, TARGETS, 1)}?",
        )
    newest = onnx.defs.onnx_opset_version()
    if not 18 <= opset <= newest:
        raise failure("export_onnx", "opset", expected=f"18 to {newest}", got=str(opset), do="use 20, the default")
    return TARGETS[target]


def _to_onnx(converted: GraphModule, inputs: Inputs, opset: int) -> onnx.ModelProto:
    operators: Any = getattr(onnxscript, f"opset{min(opset, 20)}")

    def quantize(x, scale, zero_point, axis: int):  # type: ignore[no-untyped-def]
        return operators.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize(codes, scale, zero_point, axis: int):  # type: ignore[no-untyped-def]
        return operators.DequantizeLinear(codes, scale, zero_point, axis=axis)

    def batch_norm(x, weight, bias, mean, variance, training, momentum, eps: float, cudnn):  # type: ignore[no-untyped-def]
        return operators.BatchNormalization(x, weight, bias, mean, variance, epsilon=eps)

    def average_pool(x, size):  # type: ignore[no-untyped-def]
        if list(size) != [1, 1]:
            raise NotImplementedError("only the average of whole maps: the exporter's decompositions know the others")
        return operators.GlobalAveragePool(x)

    device = next((b.device for b in converted.buffers()), inputs[0].device)
    # A batch of 2: export treats 1 as a constant.
    batches = tuple(x.detach()[:1].expand(2, *x.shape[1:]).contiguous().to(device) for x in inputs)
    dynamic = {0: torch.export.Dim("batch", min=1)}
    with _quiet():
        try:
            captured = torch.export.export(
                converted, batches, dynamic_shapes=tuple(dynamic for _ in batches), strict=False
            )
            program = _translate(
                captured,
                *_names(converted),
                opset,
                {QUANTIZE: quantize, DEQUANTIZE: dequantize},
                {BATCH_NORM: batch_norm, AVERAGE_POOL: average_pool},
            )
        except Exception as error:
            raise failure(
                "export_onnx",
                "torch.onnx.export",
                expected="a graph that it can translate with a dynamic batch",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                do="check that the model's forward does not depend on the batch size",
            ) from error
    return program.model_proto


def _names(converted: GraphModule) -> tuple[list[str], list[str]]:
    """Return the names of the file's inputs and outputs: image and logits, or one name each if they are several."""
    inputs = [node.name for node in converted.graph.nodes if node.op == "placeholder"]
    outputs = tree_leaves(next(node.args[0] for node in converted.graph.nodes if node.op == "output"))
    return (
        inputs if len(inputs) > 1 else ["image"],
        [f"output_{number}" for number in range(len(outputs))] if len(outputs) > 1 else ["logits"],
    )


def _translate(
    captured: torch.export.ExportedProgram,
    inputs: list[str],
    outputs: list[str],
    opset: int,
    table: dict[Any, Any],
    undecomposed: dict[Any, Any],
) -> torch.onnx.ONNXProgram:
    """Translate a captured program, without the exporter's decompositions if it can.

    The operators of the usual transformer have translations of their own. Decomposing them first gives the same file
    and takes more than half of the time, because every operator is traced again with symbolic shapes. undecomposed:
    translations of operators that only the exporter's decompositions know.
    """

    def translate(table: dict[Any, Any]) -> torch.onnx.ONNXProgram:
        program = torch.onnx.export(
            captured,
            dynamo=True,
            opset_version=opset,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table=table,
            verbose=False,
        )
        assert program is not None
        return program

    captured.run_decompositions = lambda *_, **__: captured
    try:
        return translate(table | undecomposed)
    except torch.onnx.OnnxExporterError:  # an operator without a translation of its own
        del captured.run_decompositions
        return translate(table)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Silence the exporter's progress lines and deprecation warnings: what the user needs is in the report."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _add_metadata(model: onnx.ModelProto, converted: GraphModule, target: str) -> None:
    calibration = calibration_of(converted)
    assert calibration is not None  # convert_fx refuses a model without
    values = {
        PLAN_KEY: plan_of(converted).to_json(),
        VERSION_KEY: version("ptq4vit-fx"),
        CALIBRATION_KEY: calibration.fingerprint(),
        PROVENANCE_KEY: json.dumps(calibration.provenance),
        TARGET_KEY: target,
    }
    onnx.helper.set_model_props(model, values)
    model.producer_name, model.producer_version = "ptq4vit_fx", values[VERSION_KEY]


def _float_bytes(model: onnx.ModelProto) -> int:
    """Return what the same initializers would take as float32."""
    total = 0
    for initializer in model.graph.initializer:
        count = 1
        for dimension in initializer.dims:
            count *= dimension
        total += 4 * count
    return total
