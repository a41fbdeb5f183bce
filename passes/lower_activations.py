"""Lower quantizers of activations to QuantizeLinear / DequantizeLinear on uint8, twins to two branches.

A product of a twin is the sum of two integer products (DESIGN: x = fine part + coarse part, so
x @ w = fine @ w + coarse @ w). Scales per head leave the product: the operand is divided by them in front, and
the float result is multiplied behind, because integer kernels hold one activation scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta
from ptq4vit_fx.passes.graph.holders import hold
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, QUANTIZE
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.insert_quantizers import TwinQuantizer, UniformQuantizer

UINT8_MAX = 255
#: What the module with a site's scales per head has behind the site's name.
HEAD = "_head"


@dataclass(frozen=True)
class Branch:
    """One QuantizeLinear / DequantizeLinear pair: codes quant_min .. quant_max in a uint8 container.

    below, above: whether values can lie outside on that side. The zero point is chosen so that the container itself
    saturates where that is needed; where it cannot, the value is clamped in front.
    """

    name: str
    scale: Tensor
    quant_min: int
    quant_max: int
    below: bool = True
    above: bool = True

    @property
    def zero_point(self) -> int:
        """Put quant_min at code 0 if values fall below it, else quant_max at code 255."""
        if self.below and self.above and self.quant_min == -self.quant_max - 1:
            return 128  # symmetric: the usual zero point, whatever the bits
        return -self.quant_min if self.below else UINT8_MAX - self.quant_max

    def clamp_bounds(self) -> tuple[float | None, float | None]:
        """Return the bounds (in values) that the container does not enforce by itself."""
        low = self.quant_min if self.below and self.quant_min + self.zero_point > 0 else None
        high = self.quant_max if self.above and self.quant_max + self.zero_point < UINT8_MAX else None
        scale = float(self.scale)
        return (None if low is None else low * scale, None if high is None else high * scale)


@graph_pass(before=Stage.SIMULATED, after=Stage.CONVERTED)
def lower_activations(graph_module: GraphModule) -> int:
    """Lower every activation quantizer in front of a planned product."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if "ptq4vit_op" in node.meta:
            count += _lower_product(graph_module, node)
    return count


def _lower_product(graph_module: GraphModule, node: Node) -> int:
    """Rewrite one product; return how many operands were lowered."""
    lowered = 0
    branches: list[list[Node]] = []
    head_scales: list[Tensor] = []
    for operand in node.args[:2]:
        assert isinstance(operand, Node)
        if operand.op != "call_module":  # a folded weight
            branches.append([operand])
            continue
        module = graph_module.get_submodule(str(operand.target))
        with graph_module.graph.inserting_before(node):
            if isinstance(module, TwinQuantizer):
                branches.append(_twin(graph_module, operand, module))
            else:
                assert isinstance(module, UniformQuantizer)
                branches.append([_uniform(graph_module, operand, module, head_scales)])
        lowered += 1
    _write_sum(graph_module, node, [(lhs, rhs) for lhs in branches[0] for rhs in branches[1]], head_scales)
    return lowered


def _uniform(graph_module: GraphModule, quantized: Node, module: UniformQuantizer, head_scales: list[Tensor]) -> Node:
    """Return the dequantized operand; scales per head are divided out in front and appended to `head_scales`.

    But for one power of two, which stays the quantizer's scale: OpenVINO takes an operand of scale 1 for a float one.
    """
    x, scale, quantizer = quantized.args[0], module.scale, module.quantizer
    assert isinstance(x, Node)
    if module.axis is not None:
        unit = torch.exp2(torch.log2(scale).mean().round())
        per_head = module.params.broadcast(3) / unit  # (heads, 1, 1)
        site = quantized.meta["ptq4vit_site"]
        (divisor,) = hold(graph_module, f"{site}{HEAD}", {"scale": per_head}, like=quantized)
        x = _call(graph_module, quantized, torch.div, x, divisor)
        head_scales.append(per_head)
        scale = unit
    below = int(quantizer.zero_point(scale))
    return _pair(graph_module, quantized, x, Branch("", scale, -below, quantizer.top - below))


def _write_sum(
    graph_module: GraphModule, node: Node, pairs: list[tuple[Node, Node]], head_scales: list[Tensor]
) -> None:
    """Replace product(lhs, rhs) by the sum over the pairs of branches; the last term carries the bias."""
    graph = graph_module.graph
    with graph.inserting_before(node):
        terms: list[Node] = []
        for lhs, rhs in pairs:
            term = graph.node_copy(node)
            term.args = (lhs, rhs, *node.args[2:])
            if len(node.args) > 2 and len(terms) < len(pairs) - 1:
                term.update_arg(2, None)
            term.meta = dict(node.meta)
            terms.append(term)
        result = terms[0]
        for term in terms[1:]:
            result = _call(graph_module, node, torch.add, result, term)
        if head_scales:
            path = f"{node.meta['ptq4vit_op']}.output_head"
            (scale,) = hold(graph_module, path, {"scale": torch.stack(head_scales).prod(0)}, like=node)
            result = _call(graph_module, node, torch.mul, result, scale)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _twin(graph_module: GraphModule, quantized: Node, module: TwinQuantizer) -> list[Node]:
    """Return the dequantized fine and coarse part of a twin-quantized operand."""
    x = quantized.args[0]
    assert isinstance(x, Node)
    twin, params = module.quantizer, module.params
    top = twin.levels - 1

    def pair(value: Node, branch: Branch) -> Node:
        return _pair(graph_module, quantized, value, branch)

    if twin.form == "gelu":
        # Saturation alone splits the signs: zero point 255 drops the positives, zero point 0 the negatives.
        fine = Branch("fine", params.fine_scale, -twin.steps, 0, below=False)
        return [pair(x, fine), pair(x, Branch("coarse", params.coarse_scale, 0, top))]
    threshold = float(twin.threshold(params))
    if twin.wide or params.shift <= twin.bits - 1:
        # x = min(x, t) + max(x - t, 0): the fine part saturates at t by itself, the other one at zero. A wide twin is
        # just that. The paper's is where t is a multiple of the coarse step, but for two codes, both to the better:
        # the one just below t becomes t, and the one just below 1 becomes 1.
        rest = _call(graph_module, quantized, torch.sub, x, threshold)
        fine = Branch("fine", params.fine_scale, 0, twin.steps, below=False)
        coarse = Branch("coarse", params.coarse_scale, 0, twin.steps, above=False)
        return [pair(x, fine), pair(rest, coarse)]
    # t is at most half a coarse step: the coarse part of what lies below t is zero by itself. The fine part of the
    # others has to be made zero, as in the paper; x - high is exact, because high is x or 0.
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    high = _call(graph_module, quantized, F.threshold, x, below, 0.0)
    low = _call(graph_module, quantized, torch.sub, x, high)
    fine = Branch("fine", params.fine_scale, 0, top, below=False)
    return [pair(low, fine), pair(x, Branch("coarse", params.coarse_scale, 0, top, below=False))]


def _pair(graph_module: GraphModule, quantized: Node, x: Node, branch: Branch) -> Node:
    """Insert [clamp,] quantize_linear, dequantize_linear; return the last."""
    low, high = branch.clamp_bounds()
    if low is not None or high is not None:
        x = _call(graph_module, quantized, torch.clamp, x, low, high)
    site = quantized.meta["ptq4vit_site"]
    zero_point = torch.full_like(branch.scale, branch.zero_point, dtype=torch.uint8)
    path = f"{site}_{branch.name}" if branch.name else site
    scale, zero = hold(graph_module, path, {"scale": branch.scale, "zero_point": zero_point}, like=quantized)
    codes = _call(graph_module, quantized, QUANTIZE, x, scale, zero, 0)
    result = _call(graph_module, quantized, DEQUANTIZE, codes, scale, zero, 0)
    for made in (codes, result):
        adopt_meta(made, quantized, path).meta["ptq4vit_site"] = site
    return result


def _call(graph_module: GraphModule, like: Node, function: Any, *args: Any) -> Node:
    return adopt_meta(graph_module.graph.call_function(function, args), like)
