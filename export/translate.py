"""Translate a graph of Q/DQ nodes to ONNX with torch's exporter: standard operators, nothing else."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from torch.fx import GraphModule

from ptq4vit_fx.export.refusals import check_bags, refused
from ptq4vit_fx.inputs.batches import FIXED_BATCH
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.batch_limits import batch_limits
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, QUANTIZE
from ptq4vit_fx.passes.graph.places import node_at
from ptq4vit_fx.passes.graph.silence import muted_stdout, quiet_loggers, silence

BATCH_NORM = torch.ops.aten.batch_norm.default
THRESHOLD = torch.ops.aten.threshold.default
AVERAGE_POOL = torch.ops.aten.adaptive_avg_pool2d.default


@exclusive()
def translate(
    converted: GraphModule, inputs: Inputs, opset: int, batch: int | None, names: tuple[list[str], list[str]]
) -> ir.Model:
    """Return the ONNX model of a graph at stage QDQ.

    inputs: one example per input, the batch first. batch: the fixed number of images, or None for a dynamic dimension.
    names: of the inputs and the outputs. Raises PTQError with the exporter's reason.
    """
    device = next((b.device for b in converted.buffers()), inputs[0].device)
    # Dynamic: an example of 2, because export treats 1 as a constant; but not of the one size that the model takes,
    # with which every line of it agrees.
    only: int | None = converted.meta.get(FIXED_BATCH)
    size = batch or (3 if only == 2 else 2)
    batches = tuple(x.detach()[:1].expand(size, *x.shape[1:]).contiguous().to(device) for x in inputs)
    shapes = None if batch else tuple({0: torch.export.Dim("batch", min=1)} for _ in batches)
    check_bags(converted.graph)
    graphs = [converted.graph]
    # What is left to say is in the report: no progress lines of the exporter, no logs of onnx's libraries.
    quiet = quiet_loggers(("onnxscript", "onnx_ir"), logging.ERROR)
    with silence(), muted_stdout(), quiet, batch_limits(partial(node_at, graph_module=converted)) as limits:
        try:
            captured = torch.export.export(converted, batches, dynamic_shapes=shapes, strict=False)
            graphs.append(captured.graph)
            program = _translate(captured, *names, opset, *_translations(opset))
        except Exception as error:  # noqa: BLE001 - the sentence has its cause; torch's own story fills a screen
            raise refused(error, graphs, batch, only, limits) from None
    return program.model


def _translations(opset: int) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return how operators are written that the exporter does not know, and those that its decompositions alone do."""
    operators: Any = getattr(onnxscript, f"opset{min(opset, 20)}")

    def quantize(x, scale, zero_point, axis: int):  # type: ignore[no-untyped-def]
        return operators.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize(codes, scale, zero_point, axis: int):  # type: ignore[no-untyped-def]
        return operators.DequantizeLinear(codes, scale, zero_point, axis=axis)

    def threshold(x, below: float, value: float):  # type: ignore[no-untyped-def]
        passed = operators.ThresholdedRelu(x, alpha=below)
        return passed if value == 0 else operators.Where(operators.Greater(x, below), x, value)

    def batch_norm(x, weight, bias, mean, variance, training, momentum, eps: float, cudnn):  # type: ignore[no-untyped-def]
        return operators.BatchNormalization(x, weight, bias, mean, variance, epsilon=eps)

    def average_pool(x, size):  # type: ignore[no-untyped-def]
        if list(size) != [1, 1]:
            raise NotImplementedError("only the average of whole maps: the exporter's decompositions know the others")
        return operators.GlobalAveragePool(x)

    own = {QUANTIZE: quantize, DEQUANTIZE: dequantize, THRESHOLD: threshold}
    return own, {BATCH_NORM: batch_norm, AVERAGE_POOL: average_pool}


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
    with contextlib.suppress(torch.onnx.OnnxExporterError):  # an operator without a translation of its own
        program = translate(table | undecomposed)
        if _is_complete(program):
            return program
    del captured.run_decompositions
    return translate(table)


def _is_complete(program: torch.onnx.ONNXProgram) -> bool:
    """Return whether every tensor that is read exists: of two equal reshapes, the exporter loses one shape."""
    graph = program.model.graph
    given = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    read = [value for node in graph for value in node.inputs if value is not None]
    return all(value.producer() is not None or id(value) in given for value in read)
