"""Multiply in float32 what a forward multiplies in another type of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.marks import kind_of
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import dtype_of
from ptq4vit_fx.passes.graph.stages import Stage

#: Types that a quantizer does not take: what is multiplied becomes codes, which need none of their digits.
OTHER_FLOATS = (torch.float64, torch.float16, torch.bfloat16)


@graph_pass(before=Stage.CANONICAL, after=Stage.CANONICAL)
def multiply_in_float32(graph_module: GraphModule) -> int:
    """Let products of double or half operands read them as float32; what they give has the type that it had."""
    found = [n for n in graph_module.graph.nodes if kind_of(n) is not None and dtype_of(n) in OTHER_FLOATS]
    for node in found:
        write, dtype = Writer(node), dtype_of(node)
        operands = (write.method("float", x) if isinstance(x, Node) else x for x in node.args[:3])  # and the bias
        product = write(cast("Callable[..., Any]", node.target), *operands, *node.args[3:])
        replace(node, write.method("to", product, dtype))
    return len(found)
