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
from ptq4vit_fx.quantizers import QParams, Quantizer


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


@graph_pass(before=Stage.OBSERVED, after=Stage.SIMULATED)
def insert_quantizers(graph_module: GraphModule) -> int:
    """Put a quantizer on every operand of every observed product, and take the observers away.

    The plan and the parameters are those of the calibration that is set on the graph.
    """
    calibration = calibration_of(graph_module)
    assert calibration is not None
    count = 0
    for node, name in planned_products(graph_module.graph):
        for index, operand in enumerate(OPERANDS):
            key = site(name, operand)
            module = FakeQuantize(calibration.plan.quantizers[key], calibration.params[key])
            graph_module.add_submodule(identifier(key), module)
            node.update_arg(index, Writer(node, scope=key).module(identifier(key), node.args[index]))
        (observer,) = node.users
        replace(observer, node)
        graph_module.delete_submodule(str(observer.target))
        count += 1
    return count
