"""Store weights as int8 codes behind a DequantizeLinear."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import get_attribute, is_stored, stored_path
from ptq4vit_fx.passes.graph.marks import planned_products, scope_of
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE
from ptq4vit_fx.passes.graph.rewriter import Writer, drop_stored, replace
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.insert_quantizers import FakeQuantize
from ptq4vit_fx.quantizers import UniformParams


@graph_pass(before=Stage.SIMULATED, after=Stage.SIMULATED)
def fold_weights(graph_module: GraphModule) -> int:
    """Fold get_attr -> FakeQuantize into an int8 buffer and a dequantize_linear call; the float weights leave."""
    count = 0
    for node, _ in planned_products(graph_module.graph):
        quantized = cast("Any", node.args[1])
        if quantized.op == "call_module" and is_stored(quantized.args[0]):
            _fold(graph_module, quantized)
            count += 1
    return count


def _fold(graph_module: GraphModule, quantized: Node) -> None:
    module = graph_module.get_submodule(str(quantized.target))
    source = quantized.args[0]
    assert isinstance(module, FakeQuantize)
    assert isinstance(source, Node)
    params = module.params
    assert isinstance(params, UniformParams)
    weight = get_attribute(graph_module, stored_path(source)).detach()
    tensors = {
        "codes": module.quantizer.codes(weight, params).to(torch.int8),
        "scale": params.scale,
        "zero_point": torch.zeros_like(params.scale, dtype=torch.int8),
    }
    axis = 0 if params.axis is None else params.axis % weight.ndim
    write = Writer(quantized, scope=scope_of(quantized))
    replace(quantized, write(DEQUANTIZE, *write.hold(tensors), axis))
    graph_module.delete_submodule(str(quantized.target))
    drop_stored(source)
