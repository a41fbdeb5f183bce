"""Put what the codes of a calibration stand for in the place of the weights that were rounded to them."""

from __future__ import annotations

from typing import cast

from torch.fx import GraphModule, Node

from ptq4vit_fx.names import identifier, site
from ptq4vit_fx.passes.graph.contract import calibration_of, graph_pass
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.rewriter import Writer, drop_stored
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.SIMULATED, after=Stage.SIMULATED)
def round_weights(graph_module: GraphModule) -> int:
    """Give each weight with codes a tensor of its own, which its quantizer gives those codes.

    Products that share a weight may have rounded it apart. Nothing behind this pass asks where a weight is from.
    """
    calibration = calibration_of(graph_module)
    assert calibration is not None
    count = 0
    for node, name in planned_products(graph_module.graph):
        key = site(name, "rhs")
        values = calibration.rounded(key)
        if values is None:
            continue
        quantized = cast("Node", node.args[1])
        source, path = cast("Node", quantized.args[0]), f"{identifier(key)}_rounded"
        graph_module.register_buffer(path, values)
        quantized.update_arg(0, Writer(quantized, like=source).attribute(path))
        drop_stored(source)
        count += 1
    return count
