"""Write a patch embedding (kernel = stride) as a linear layer over patches.

No runtime has an integer convolution with float output behind QDQ, but all have an integer matrix product.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ptq4vit_fx.names import leaf_of, owner_of
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import get_attribute, is_stored, moves_only, permutation, stored_path
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.SIMULATED, after=Stage.SIMULATED)
def lower_patch_convolution(graph_module: GraphModule) -> int:
    """Replace conv2d(Q(x), Q(w)) by linear(Q(patches(x)), Q(w as a matrix)) where patches do not overlap.

    The same products are summed, in another order. Convolutions with overlap, padding, dilation or groups, and
    sizes that the patch does not divide, are left alone.
    """
    found = [node for node, _ in planned_products(graph_module.graph) if _is_patch_embedding(node)]
    # Of all of them before the first is written: what is written has no shape, and another one may read it.
    sizes = [shape_of(cast("Node", cast("Node", node.args[0]).args[0]))[2:] for node in found]
    for node, size in zip(found, sizes, strict=True):
        _lower(graph_module, node, size)
    return len(found)


def _is_patch_embedding(node: Node) -> bool:
    if node.target is not F.conv2d:
        return False
    image, weight = (cast("Node", cast("Node", operand).args[0]) for operand in node.args[:2])
    stride, padding, dilation, groups = cast("tuple[Any, ...]", node.args[3:])
    kernel, size = shape_of(weight)[2:], shape_of(image)[2:]
    divides = len(size) == 2 and all(length % step == 0 for length, step in zip(size, kernel, strict=True))
    unpadded = padding in ((0, 0), "valid")
    plain = stride == kernel and unpadded and dilation == (1, 1) and groups == 1
    return is_stored(weight) and plain and divides


def _lower(graph_module: GraphModule, node: Node, size: tuple[int, ...]) -> None:
    quantized, weight, bias = cast("tuple[Node, Node, Any]", node.args[:3])
    image, kernel = cast("Node", quantized.args[0]), cast("Node", weight.args[0])
    columns, channels, patch_height, patch_width = shape_of(kernel)
    height, width = size
    rows, cols = height // patch_height, width // patch_width
    matrix = f"{stored_path(kernel)}_matrix"
    value = get_attribute(graph_module, stored_path(kernel)).detach().reshape(columns, -1)
    graph_module.get_submodule(owner_of(matrix)).register_buffer(leaf_of(matrix), value)
    write = Writer(quantized, like=node)
    split = write(torch.reshape, image, (-1, channels, rows, patch_height, cols, patch_width))
    patches = write(torch.permute, split, (0, 2, 4, 1, 3, 5))
    quantized.update_arg(0, write(torch.reshape, patches, (-1, rows * cols, value.shape[1])))
    weight.update_arg(0, Writer(weight, like=kernel).attribute(matrix))
    write = Writer(node)
    tokens = write(F.linear, quantized, weight, bias)
    maps = write(torch.reshape, write(torch.transpose, tokens, 1, 2), (-1, columns, rows, cols))
    for flat in [user for user in node.users if shape_of(user)[1:] == (columns, rows * cols)]:
        for user in [user for user in flat.users if moves_only(flat) and permutation(user, 3) == [0, 2, 1]]:
            user.replace_all_uses_with(tokens)  # the model itself goes back to tokens
    replace(node, maps, product=tokens)
