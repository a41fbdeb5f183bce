"""Fold scales per head of attention operands into the projection that computes them.

The projection already multiplies every output column by a scale of its own, so dividing a head's columns by that head's
scale costs nothing there: the projection then computes in units of the scale, and the quantizer behind it has scale 1.
A constant factor in between, the 1 / sqrt(d) of attention, goes the same way.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import get_attribute, moves_only
from ptq4vit_fx.passes.graph.holders import hold
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.lower_activations import HEAD

MULTIPLICATIONS = (operator.mul, torch.mul, torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)


@dataclass
class Projection:
    """A linear layer whose values all reach divisions by scales per head, through nothing but moves and factors."""

    linear: Node
    divisions: list[Node]
    factors: list[Node]


@graph_pass(before=Stage.CONVERTED, after=Stage.CONVERTED)
def fold_head_scales(graph_module: GraphModule) -> int:
    """Fold divisions by scales per head, and constant factors, into the linear layers in front of them.

    A linear layer is left as it is if any of its values goes elsewhere too, or to two heads with different scales.
    """
    linears = [n for n in graph_module.graph.nodes if n.target is F.linear and "ptq4vit_op" in n.meta]
    projections = [p for p in (_projection(graph_module, node) for node in linears) if p is not None]
    if not projections:
        return 0
    columns = _columns(graph_module, projections)
    return sum(_fold(graph_module, projection, columns) for projection in projections)


def _projection(graph_module: GraphModule, linear: Node) -> Projection | None:
    """Follow every value of a linear layer to divisions by scales per head; None if one goes anywhere else."""
    weight = linear.args[1]
    if not isinstance(weight, Node) or weight.target is not DEQUANTIZE or len(weight.users) > 1:
        return None
    if not _is_stored(weight.args[0]):
        return None
    found = Projection(linear, [], [])
    queue = [(linear, user) for user in linear.users]
    while queue:
        node, user = queue.pop()
        if user.target in (getattr, "size") or (moves_only(user) and user.args[0] is not node):
            continue  # reads its shape alone
        if _is_division(user):
            found.divisions.append(user)
            continue
        if _factor(graph_module, user) is not None:
            found.factors.append(user)
        elif not moves_only(user):
            return None
        queue.extend((user, reader) for reader in user.users)
    return found if found.divisions else None


def _is_stored(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _is_division(node: Node) -> bool:
    divisor = node.args[1] if node.target is torch.div else None
    return isinstance(divisor, Node) and str(divisor.target).endswith(f"{HEAD}.scale")


def _factor(graph_module: GraphModule, node: Node) -> float | None:
    """Return the positive number that a node multiplies by, None if it does something else."""
    factor = node.args[1] if node.target in MULTIPLICATIONS and len(node.args) == 2 else None
    if isinstance(factor, Node) and factor.op == "get_attr":
        value = get_attribute(graph_module, str(factor.target))
        factor = float(value) if value.numel() == 1 else None
    return float(factor) if isinstance(factor, (int, float)) and factor > 0 else None


def _columns(graph_module: GraphModule, projections: list[Projection]) -> dict[Node, Tensor]:
    """Return division -> the column of the projection that each of its values comes from.

    The graph itself moves the numbers of the columns: no list of what every reshape does is needed.
    """

    class Columns(Interpreter):
        def run_node(self, n: Node) -> Any:
            if n in linears:
                shape = n.meta["tensor_meta"].shape
                return torch.arange(shape[-1], dtype=torch.float32).expand(shape).contiguous()
            if n in factors:
                return self.fetch_args_kwargs_from_env(n)[0][0]
            if n in divisions:
                columns[n] = self.fetch_args_kwargs_from_env(n)[0][0].long()
            return super().run_node(n)

    linears = {p.linear for p in projections}
    factors = {factor for p in projections for factor in p.factors}
    divisions = {division for p in projections for division in p.divisions}
    columns: dict[Node, Tensor] = {}
    inputs = [
        torch.zeros(n.meta["tensor_meta"].shape, dtype=n.meta["tensor_meta"].dtype)
        for n in graph_module.graph.nodes
        if n.op == "placeholder"
    ]
    with torch.inference_mode():
        Columns(graph_module).run(*inputs)
    return columns


def _fold(graph_module: GraphModule, projection: Projection, columns: dict[Node, Tensor]) -> int:
    """Rewrite one projection; return how many divisions went."""
    linear = projection.linear
    scale_node = cast("Node", cast("Node", linear.args[1]).args[1])
    scale = get_attribute(graph_module, str(scale_node.target))
    count = int(linear.meta["tensor_meta"].shape[-1])
    divisors = torch.zeros(count, dtype=torch.float64)
    for division in projection.divisions:
        held = cast("Node", division.args[1])
        factor = 1.0
        for node in _way(division, linear):
            if node in projection.factors:
                factor *= _factor(graph_module, node) or 1.0
        per_head = get_attribute(graph_module, str(held.target)).double().flatten() / factor
        for head, numbers in enumerate(columns[division].movedim(-3, 0)):
            mine = numbers.unique()
            taken = divisors[mine]
            if bool(((taken != 0) & (taken != per_head[head])).any()):
                return 0
            divisors[mine] = per_head[head]
    divisors[divisors == 0] = 1.0
    owner = graph_module.get_submodule(str(scale_node.target).rpartition(".")[0])
    zero_point = cast("Tensor", owner.zero_point)
    owner.zero_point = zero_point.expand(count).clone()  # a scale per column, also where there was one
    owner.scale = (scale.double() / divisors).float()
    bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
    if isinstance(bias, Node):
        folded = (get_attribute(graph_module, str(bias.target)).detach().double() / divisors).float()
        with graph_module.graph.inserting_before(linear):
            (held,) = hold(graph_module, f"{linear.meta['ptq4vit_op']}_folded", {"bias": folded}, like=linear)
        linear.replace_input_with(bias, held)
    for node in (*projection.divisions, *projection.factors):
        node.replace_all_uses_with(cast("Node", node.args[0]))
    return len(projection.divisions)


def _way(node: Node, start: Node) -> list[Node]:
    """Return the nodes between a division and its projection."""
    way = []
    while node is not start:
        node = cast("Node", node.args[0])
        way.append(node)
    return way
