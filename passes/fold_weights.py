"""Store weights as int8 codes behind a DequantizeLinear."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta, get_attribute
from ptq4vit_fx.passes.graph.holders import hold
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.insert_quantizers import UniformQuantizer


@graph_pass(before=Stage.SIMULATED, after=Stage.SIMULATED)
def fold_weights(graph_module: GraphModule) -> int:
    """Fold get_attr -> UniformQuantizer into an int8 buffer and a dequantize_linear call; the float weights leave."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if "ptq4vit_op" not in node.meta:
            continue
        quantized = node.args[1]
        if quantized.op == "call_module" and quantized.args[0].op == "get_attr":
            _fold(graph_module, quantized)
            count += 1
    return count


def _fold(graph_module: GraphModule, quantized: Node) -> None:
    module = graph_module.get_submodule(str(quantized.target))
    source = quantized.args[0]
    assert isinstance(module, UniformQuantizer)
    assert isinstance(source, Node)
    weight = get_attribute(graph_module, str(source.target)).detach()
    codes = module.quantizer.codes(weight, module.params).to(torch.int8)
    axis = 0 if module.axis is None else module.axis % weight.ndim
    site = quantized.meta["ptq4vit_site"]
    tensors = {
        "codes": codes,
        "scale": module.scale,
        "zero_point": torch.zeros_like(module.scale, dtype=torch.int8),
    }
    with graph_module.graph.inserting_before(quantized):
        attributes = hold(graph_module, site, tensors, like=quantized)
        folded = graph_module.graph.call_function(DEQUANTIZE, (*attributes, axis))
    adopt_meta(folded, quantized, site).meta["ptq4vit_site"] = site
    quantized.replace_all_uses_with(folded)
    graph_module.graph.erase_node(quantized)
    graph_module.delete_submodule(str(quantized.target))
    _drop(graph_module, source)


def _drop(graph_module: GraphModule, source: Node) -> None:
    """Remove a get_attr node and its float tensor unless something else reads it."""
    target = str(source.target)
    if not source.users:
        graph_module.graph.erase_node(source)
    if any(node.op == "get_attr" and node.target == target for node in graph_module.graph.nodes):
        return
    owner, _, leaf = target.rpartition(".")
    delattr(graph_module.get_submodule(owner), leaf)
