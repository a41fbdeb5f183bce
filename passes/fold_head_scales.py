"""Fold scales per head of attention operands into the projection that computes them.

The projection already multiplies every output column by a scale of its own, so dividing a head's columns by that head's
scale costs nothing there: the projection then computes in units of the scale, and the quantizer behind it has scale 1.
A constant factor in between, the 1 / sqrt(d) of attention, goes the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ptq4vit_fx.names import is_head, owner_of
from ptq4vit_fx.passes.graph.channels import positive_factor
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import get_attribute, is_stored, moves_only, stored_path
from ptq4vit_fx.passes.graph.marks import planned_product, planned_products
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE
from ptq4vit_fx.passes.graph.rewriter import SiteTensors, Writer
from ptq4vit_fx.passes.graph.shapes import example_of, shape_of
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.quantizers import usable_scale

#: Steps of a container of codes, from end to end.
STEPS = 255


@dataclass
class Projection:
    """A linear layer whose values all reach divisions by scales per head, through nothing but moves and factors."""

    linear: Node
    divisions: list[Node]
    factors: list[Node]


@graph_pass(before=Stage.LOWERED, after=Stage.LOWERED)
def fold_head_scales(graph_module: GraphModule) -> int:
    """Fold divisions by scales per head, and constant factors, into the linear layers in front of them.

    A linear layer is left as it is if any of its values goes elsewhere too, or to two heads with different scales.
    """
    linears = [node for node, _ in planned_products(graph_module.graph) if node.target is F.linear]
    projections = [p for p in (_projection(graph_module, node) for node in linears) if p is not None]
    return sum(_fold(graph_module, projection) for projection in projections)


def _projection(graph_module: GraphModule, linear: Node) -> Projection | None:
    """Follow every value of a linear layer to divisions by scales per head; None if one goes anywhere else."""
    weight = linear.args[1]
    if not isinstance(weight, Node) or weight.target is not DEQUANTIZE or len(weight.users) > 1:
        return None
    if not is_stored(weight.args[0]):
        return None
    found = Projection(linear, [], [])
    queue = [(linear, user) for user in linear.users]
    while queue:
        node, user = queue.pop()
        if user.target == "size" or (user.target is getattr and not moves_only(user)):
            continue  # reads its shape alone, as expand_as does of its other operand
        if moves_only(user) and user.args[0] is not node:
            continue
        if _is_division(graph_module, user):
            found.divisions.append(user)
            continue
        if positive_factor(graph_module, user) is not None:
            found.factors.append(user)
        elif not moves_only(user):
            return None
        queue.extend((user, reader) for reader in user.users)
    return found if found.divisions else None


def _is_division(graph_module: GraphModule, node: Node) -> bool:
    """Return whether this divides by scales per head: by tensors of this package's, not by a model's `head.scale`."""
    holder = owner_of(stored_path(node.args[1])) if node.target is torch.div else ""
    return is_head(holder) and isinstance(graph_module.get_submodule(holder), SiteTensors)


def _columns(graph_module: GraphModule, projection: Projection, division: Node) -> Tensor:
    """Return the column of the projection that each value in front of a division comes from.

    The graph itself moves the numbers of the columns: no list of what every reshape does is needed. Only what lies
    between is run, on the example's shapes.
    """
    interpreter = Interpreter(graph_module, garbage_collect_values=False)
    values = interpreter.env
    shape = shape_of(projection.linear)
    values[projection.linear] = torch.arange(shape[-1], dtype=torch.float32).expand(shape).contiguous()
    way = _way(division, projection.linear)
    with torch.inference_mode():
        for node in reversed(way[:-1]):
            if node in projection.factors:
                values[node] = values[cast("Node", node.args[0])]
                continue
            for operand in node.all_input_nodes:
                values.setdefault(operand, example_of(graph_module, operand))
            values[node] = interpreter.run_node(node)
    return cast("Tensor", values[way[0]]).long()


def _fold(graph_module: GraphModule, projection: Projection) -> int:
    """Rewrite one projection; return how many divisions went."""
    linear = projection.linear
    scale_path = stored_path(cast("Node", linear.args[1]).args[1])
    scale = get_attribute(graph_module, scale_path)
    count = shape_of(linear)[-1]
    divisors = torch.zeros(count, dtype=torch.float64)
    for division in projection.divisions:
        factors = [positive_factor(graph_module, n) or 1.0 for n in _way(division, linear) if n in projection.factors]
        per_head = get_attribute(graph_module, stored_path(division.args[1])).double().flatten() / math.prod(factors)
        for head, numbers in enumerate(_columns(graph_module, projection, division).movedim(-3, 0)):
            mine = numbers.unique()
            taken = divisors[mine]
            if bool(((taken != 0) & (taken != per_head[head])).any()):
                return 0
            divisors[mine] = per_head[head]
    divisors[divisors == 0] = 1.0
    owner = graph_module.get_submodule(owner_of(scale_path))
    zero_point = cast("Tensor", owner.zero_point)
    owner.zero_point = zero_point.expand(count).clone()  # a scale per column, also where there was one
    owner.scale = usable_scale((scale.double() / divisors).float(), STEPS)
    _fold_bias(graph_module, linear, divisors)
    for node in (*projection.divisions, *projection.factors):
        node.replace_all_uses_with(cast("Node", node.args[0]))
    return len(projection.divisions)


def _fold_bias(graph_module: GraphModule, linear: Node, divisors: Tensor) -> None:
    """Divide the bias of a linear layer: once if it is stored, in the graph if it depends on the input."""
    bias, write = linear.args[2], Writer(linear, scope=f"{planned_product(linear)}_folded")
    if is_stored(bias):
        folded = (get_attribute(graph_module, stored_path(bias)).detach().double() / divisors).float()
        (held,) = write.hold({"bias": folded})
        linear.update_arg(2, held)
    elif isinstance(bias, Node):
        (held,) = write.hold({"scale": divisors.float()})
        linear.update_arg(2, write(torch.div, bias, held))


def _way(node: Node, start: Node) -> list[Node]:
    """Return the nodes between a division and its projection."""
    way = []
    while node is not start:
        node = cast("Node", node.args[0])
        way.append(node)
    return way
