"""Bounds in front of a division by scales per head instead of a Clip behind it, which OpenVINO computes wrongly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.contract import rewrite


@rewrite(nothing="no Clip stands behind a division by constants")
def bound_in_front_of_division(model: ir.Model) -> int:
    """Turn Div by scales per head -> Clip into Min and Max per head -> Div; in place, and exact.

    The Clip's bounds are codes times the quantizer's scale; such a value times a head's scale divides back to it.
    """
    count = 0
    for clip in model.graph:
        divide = nodes.maker(clip, 0, "Div") if clip.op_type == "Clip" else None
        if divide is not None and nodes.is_constant(divide.inputs[1]):
            _bound(model, divide, clip)
            count += 1
    return count


def _bound(model: ir.Model, divide: ir.Node, clip: ir.Node) -> None:
    roles: tuple[tuple[str, names.Role], ...] = (("Max", "max"), ("Min", "min"))
    for (function, role), limit in zip(roles, clip.inputs[1:], strict=False):
        if limit is None:
            continue
        result = names.tensor(nodes.name_of(clip.outputs[0]), role)
        values = (nodes.array(limit) * nodes.array(divide.inputs[1])).astype(np.float32)
        bound = nodes.add_constant(model, names.tensor(result, "bound"), values)
        node = nodes.new_node(function, [divide.inputs[0], bound], result, names.variant(nodes.name_of(clip), function))
        divide.prepend(node)
        divide.replace_input_with(0, node.outputs[0])
    nodes.take_over(divide, clip.outputs[0])
    model.graph.remove(clip, safe=True)
