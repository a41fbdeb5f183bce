"""Replace the observers by quantizers with calibrated scales: the graph becomes the simulation."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from ptq4vit_fx.names import OPERANDS, identifier, site
from ptq4vit_fx.passes.graph.contract import calibration_of, graph_pass
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
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
def insert_quantizers(graph_module: GraphModule) -> int:
    """Put a uniform or twin quantizer on every operand of every observed product, and take the observers away.

    The plan and the parameters are those of the calibration that is set on the graph.
    """
    calibration = calibration_of(graph_module)
    assert calibration is not None
    count = 0
    for node, name in planned_products(graph_module.graph):
        for index, operand in enumerate(OPERANDS):
            key = site(name, operand)
            module = make_quantizer(calibration.plan.quantizers[key], calibration.params[key])
            graph_module.add_submodule(identifier(key), module)
            node.update_arg(index, Writer(node, scope=key).module(identifier(key), node.args[index]))
        (observer,) = node.users
        replace(observer, node)
        graph_module.delete_submodule(str(observer.target))
        count += 1
    return count


def make_quantizer(quantizer: Quantizer, params: QParams) -> UniformQuantizer | TwinQuantizer:
    """Return the module that fake-quantizes with these parameters."""
    if isinstance(quantizer, Uniform):
        assert isinstance(params, UniformParams)
        return UniformQuantizer(quantizer, params)
    assert isinstance(params, TwinParams)
    return TwinQuantizer(quantizer, params)
