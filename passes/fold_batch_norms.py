"""Multiply batch norms into the convolutions in front of them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.affine_norms import argument, is_batch_norm, opened_norm
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import get_attribute, is_stored, stored_path
from ptq4vit_fx.passes.graph.marks import kind_of
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.graph.stored_tensors import are_alone, hold, overwrite, reads_of

#: What is added to a variance where a call does not say.
EPS = 1e-5


@graph_pass(before=Stage.CANONICAL, after=Stage.CANONICAL)
def fold_batch_norms(graph_module: GraphModule) -> int:
    """Replace batch_norm(conv2d(x)) by a convolution with another weight and bias; computed in float64.

    Only where nothing else reads the convolution, or its weight. The function stays what it is, to rounding.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        product = node.args[0] if is_batch_norm(graph_module, node) else None
        if isinstance(product, Node) and _takes_a_norm(graph_module, product):
            norm = opened_norm(graph_module, node)
            _fold(graph_module, product, norm)
            replace(norm, product)
            count += 1
    return count


def _takes_a_norm(graph_module: GraphModule, product: Node) -> bool:
    """Return whether this is a convolution that one node reads, with a weight and a bias of its own."""
    if kind_of(product) != "conv2d" or len(product.users) != 1:
        return False
    stored = [x for x in product.args[1:3] if x is not None]
    return all(
        is_stored(x) and are_alone(reads_of(graph_module, get_attribute(graph_module, stored_path(x))), {product})
        for x in stored
    )


def _fold(graph_module: GraphModule, product: Node, norm: Node) -> None:
    """y = (W x + b - mean) * factor + beta, factor = gamma / sqrt(variance + eps)."""

    def stored(node: Any, otherwise: float) -> Tensor:
        value = get_attribute(graph_module, stored_path(node)) if is_stored(node) else torch.tensor(otherwise)
        return cast("Tensor", value).detach().double().cpu()

    eps = argument(norm, "eps")
    factor = stored(argument(norm, "weight"), 1.0)
    factor = factor / (stored(argument(norm, "running_var"), 1.0) + (EPS if eps is None else eps)).sqrt()
    weight, bias = cast("Node", product.args[1]), product.args[2]
    added = (stored(bias, 0.0) - stored(argument(norm, "running_mean"), 0.0)) * factor
    added = added + stored(argument(norm, "bias"), 0.0)
    if is_stored(bias):
        overwrite(graph_module, reads_of(graph_module, get_attribute(graph_module, stored_path(bias))), added)
    else:
        product.update_arg(2, Writer(product).attribute(hold(graph_module, stored_path(weight), "bias", added)))
    reads = reads_of(graph_module, get_attribute(graph_module, stored_path(weight)))
    overwrite(graph_module, reads, stored(weight, 1.0) * factor.view(-1, 1, 1, 1))
