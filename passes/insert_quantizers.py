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


class UniformQuantizer(nn.Module):
    """Fake-quantizes with one `Uniform`: float32 in and out, same shape."""

    def __init__(self, quantizer: Uniform, params: UniformParams) -> None:
        super().__init__()
        self.quantizer, self.axis = quantizer, params.axis
        self.scale: torch.Tensor
        self.register_buffer("scale", params.scale)

    @property
    def params(self) -> UniformParams:
        return UniformParams(self.scale, self.axis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantizer.fake_quantize(x, self.params.broadcast(x.ndim))


class TwinQuantizer(nn.Module):
    """Fake-quantizes with one `TwinUniform`: float32 in and out, same shape."""

    def __init__(self, quantizer: TwinUniform, params: TwinParams) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.fine_scale: torch.Tensor
        self.coarse_scale: torch.Tensor
        self.register_buffer("fine_scale", params.fine_scale)
        self.register_buffer("coarse_scale", params.coarse_scale)

    @property
    def params(self) -> TwinParams:
        return TwinParams(self.fine_scale, self.coarse_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantizer.fake_quantize(x, self.params)


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


def make_quantizer(quantizer: Quantizer, params: QParams) -> UniformQuantizer | TwinQuantizer:
    """Return the module that fake-quantizes with these parameters."""
    if isinstance(quantizer, Uniform):
        assert isinstance(params, UniformParams)
        return UniformQuantizer(quantizer, params)
    assert isinstance(params, TwinParams)
    return TwinQuantizer(quantizer, params)
