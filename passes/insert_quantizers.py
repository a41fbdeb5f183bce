"""Replace the observers by quantizers with calibrated scales: the graph becomes the simulation."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.names import OPERANDS, Site, site
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.quantizers import QParams, Quantizer, TwinParams, TwinUniform, Uniform, UniformParams


class FakeQuantize(nn.Module):
    """Fake-quantizes with one quantizer: float32 in and out, same shape. Its buffers are the parameters' tensors."""

    def __init__(self, quantizer: Quantizer, params: QParams) -> None:
        super().__init__()
        self.quantizer, self.axis = quantizer, params.axis
        for name, tensor in params.tensors().items():
            self.register_buffer(name, tensor)

    @property
    def params(self) -> QParams:
        return self.quantizer.params_from(dict(self.named_buffers(remove_duplicate=False)), self.axis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantizer.fake_quantize(x, self.params)


class UniformQuantizer(FakeQuantize):  # as long as lowering asks for the kind of the module, not of its quantizer
    quantizer: Uniform
    params: UniformParams
    scale: torch.Tensor


class TwinQuantizer(FakeQuantize):
    quantizer: TwinUniform
    params: TwinParams


@graph_pass(before=Stage.OBSERVED, after=Stage.SIMULATED)
def insert_quantizers(graph_module: GraphModule, quantizers: dict[Site, Quantizer], params: dict[Site, QParams]) -> int:
    """Put a uniform or twin quantizer on every operand of every observed product, and take the observers away."""
    count = 0
    for node in list(graph_module.graph.nodes):
        op_name = node.meta.get("ptq4vit_op")
        if op_name is None:
            continue
        for index, operand in enumerate(OPERANDS):
            key = site(op_name, operand)
            quantized = _insert(graph_module, node, index, key, quantizers[key], params[key])
            node.update_arg(index, quantized)
            count += 1
        observer = next(user for user in node.users if _is_observer_of(user, node))
        observer.replace_all_uses_with(node)
        graph_module.graph.erase_node(observer)
        graph_module.delete_submodule(str(observer.target))
    return count


def _is_observer_of(user: Node, node: Node) -> bool:
    return user.op == "call_module" and user.args[-1] is node


def _insert(
    graph_module: GraphModule, node: Node, index: int, key: Site, quantizer: Quantizer, params: QParams
) -> Node:
    module = make_quantizer(quantizer, params)
    target = key.replace(".", "_").replace(":", "_")
    graph_module.add_submodule(target, module)
    with graph_module.graph.inserting_before(node):
        quantized = graph_module.graph.call_module(target, (node.args[index],))
    quantized.meta["ptq4vit_site"] = key
    quantized.meta["tensor_meta"] = node.args[index].meta["tensor_meta"]  # type: ignore[union-attr]
    return adopt_meta(quantized, node)


def make_quantizer(quantizer: Quantizer, params: QParams) -> FakeQuantize:
    """Return the module that fake-quantizes with these parameters."""
    return {Uniform: UniformQuantizer, TwinUniform: TwinQuantizer}[type(quantizer)](quantizer, params)
