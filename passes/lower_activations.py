"""Lower quantizers of activations to QuantizeLinear / DequantizeLinear on uint8, twins to two branches.

A product of a twin is the sum of two integer products: x = fine part + coarse part, so
x @ w = fine @ w + coarse @ w. Scales per head leave the product: the operand is divided by them in front, and
the float result is multiplied behind, because integer kernels hold one activation scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.names import Range, Site, branch, head
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.marks import mark_product, planned_product, planned_products, scope_of
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, QUANTIZE
from ptq4vit_fx.passes.graph.rewriter import Writer, rename, replace
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.insert_quantizers import FakeQuantize
from ptq4vit_fx.quantizers import TwinParams, TwinUniform, Uniform, UniformParams, Unquantized, usable_scale

UINT8_MAX = 255


@dataclass(frozen=True)
class Branch:
    """One QuantizeLinear / DequantizeLinear pair: codes quant_min .. quant_max in a uint8 container.

    below, above: whether values can lie outside on that side. The zero point is chosen so that the container itself
    saturates where that is needed; where it cannot, the value is clamped in front.
    """

    range: Range | None
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


@graph_pass(before=Stage.SIMULATED, after=Stage.LOWERED)
def lower_activations(graph_module: GraphModule) -> int:
    """Lower every activation quantizer in front of a planned product."""
    return sum(_lower_product(graph_module, node) for node, _ in planned_products(graph_module.graph))


def _lower_product(graph_module: GraphModule, node: Node) -> int:
    """Rewrite one product; return how many operands were lowered."""
    write = Writer(node)
    branches: list[list[Node]] = []
    head_scales: list[Tensor] = []
    operands = cast("tuple[Node, Node]", node.args[:2])
    for operand in operands:
        module = graph_module.get_submodule(str(operand.target)) if operand.op == "call_module" else None
        if isinstance(module, FakeQuantize):
            lower = LOWERINGS[type(module.quantizer)]
            branches.append(lower(write, operand, module.quantizer, module.params, head_scales))
        else:  # a folded weight
            branches.append([operand])
    _write_sum(write, [(lhs, rhs) for lhs in branches[0] for rhs in branches[1]], head_scales)
    return sum(operand.op == "call_module" for operand in operands)


def _uniform(
    write: Writer, quantized: Node, quantizer: Uniform, params: UniformParams, head_scales: list[Tensor]
) -> list[Node]:
    """Return the dequantized operand, alone; scales per head are divided out in front and appended to `head_scales`.

    But for one power of two, which stays the quantizer's scale: OpenVINO takes an operand of scale 1 for a float one.
    """
    x, scale, site = quantized.args[0], params.scale, scope_of(quantized)
    if params.axis is not None:
        unit = torch.exp2(torch.log2(scale).mean().round())
        per_head = usable_scale(params.broadcast(3) / unit, UINT8_MAX)  # (heads, 1, 1)
        (divisor,) = write.within(head(site)).hold({"scale": per_head})
        x = write(torch.div, x, divisor)
        head_scales.append(per_head)
        scale = unit
    below = int(quantizer.zero_point(scale))
    return [_pair(write, site, x, Branch(None, scale, -below, quantizer.top - below))]


def _write_sum(write: Writer, pairs: list[tuple[Node, Node]], head_scales: list[Tensor]) -> None:
    """Replace product(lhs, rhs) by the sum over the pairs of branches; the last term carries the bias."""
    node = write.place
    name = planned_product(node)
    assert name is not None
    terms: list[Node] = []
    for number, (lhs, rhs) in enumerate(pairs, 1):
        rest = list(node.args[2:])
        if rest and number < len(pairs):
            rest[0] = None
        terms.append(write(cast("Any", node.target), lhs, rhs, *rest))
        mark_product(terms[-1], name)
        rename(terms[-1], node.name)
    result = terms[0]
    for term in terms[1:]:
        result = write(torch.add, result, term)
    if head_scales:
        product = usable_scale(torch.stack(head_scales).prod(0), 1)
        (scale,) = write.within(head(f"{name}.output")).hold({"scale": product})
        result = write(torch.mul, result, scale)
    replace(node, result)


def _twin(write: Writer, quantized: Node, twin: TwinUniform, params: TwinParams, _: list[Tensor]) -> list[Node]:
    """Return the dequantized fine and coarse part of a twin-quantized operand."""
    x, site, top = quantized.args[0], scope_of(quantized), twin.levels - 1

    def pair(value: Any, part: Branch) -> Node:
        return _pair(write, site, value, part)

    if twin.form == "gelu":
        # Saturation alone splits the signs: zero point 255 drops the positives, zero point 0 the negatives.
        fine = Branch("fine", params.fine_scale, -twin.steps, 0, below=False)
        return [pair(x, fine), pair(x, Branch("coarse", params.coarse_scale, 0, top))]
    threshold = float(twin.threshold(params))
    if twin.wide or params.shift <= twin.bits - 1:
        # x = min(x, t) + max(x - t, 0): the fine part saturates at t by itself, the other one at zero. A wide twin is
        # just that. The paper's is where t is a multiple of the coarse step, but for two codes, both to the better:
        # the one just below t becomes t, and the one just below 1 becomes 1.
        rest = write(torch.sub, x, threshold)
        fine = Branch("fine", params.fine_scale, 0, twin.steps, below=False)
        coarse = Branch("coarse", params.coarse_scale, 0, twin.steps, above=False)
        return [pair(x, fine), pair(rest, coarse)]
    # t is at most half a coarse step: the coarse part of what lies below t is zero by itself. The fine part of the
    # others has to be made zero, as in the paper; x - high is exact, because high is x or 0.
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    high = write(F.threshold, x, below, 0.0)
    low = write(torch.sub, x, high)
    fine = Branch("fine", params.fine_scale, 0, top, below=False)
    return [pair(low, fine), pair(x, Branch("coarse", params.coarse_scale, 0, top, below=False))]


def _pair(write: Writer, site: Site, x: Any, part: Branch) -> Node:
    """Insert [clamp,] quantize_linear, dequantize_linear; return the last."""
    low, high = part.clamp_bounds()
    if low is not None or high is not None:
        x = write(torch.clamp, x, low, high)
    own = write.within(branch(site, part.range))
    zero_point = torch.full_like(part.scale, part.zero_point, dtype=torch.uint8)
    scale, zero = own.hold({"scale": part.scale, "zero_point": zero_point})
    return own(DEQUANTIZE, own(QUANTIZE, x, scale, zero, 0), scale, zero, 0)


def _unquantized(write: Writer, operand: Node, quantizer: Unquantized, params: object, _: list[Tensor]) -> list[Node]:
    """Return the operand itself."""
    return [cast("Node", operand.args[0])]


#: Kind of quantizer -> what writes the dequantized branches of an operand, and appends scales per head if it has any.
LOWERINGS: dict[type, Callable[[Writer, Node, Any, Any, list[Tensor]], list[Node]]] = {
    Uniform: _uniform,
    TwinUniform: _twin,
    Unquantized: _unquantized,
}
