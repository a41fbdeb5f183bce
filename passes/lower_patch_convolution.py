"""Write a patch embedding (kernel = stride) as a linear layer over patches.

No runtime has an integer convolution with float output behind QDQ, but all have an integer matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta, get_attribute, moves_only, permutation, shape_of
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.SIMULATED, after=Stage.SIMULATED)
def lower_patch_convolution(graph_module: GraphModule) -> int:
    """Replace conv2d(Q(x), Q(w)) by linear(Q(patches(x)), Q(w as a matrix)) where patches do not overlap.

    The same products are summed, in another order. Convolutions with overlap, padding, dilation or groups, and
    sizes that the patch does not divide, are left alone.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is F.conv2d and _is_patch_embedding(node):
            _lower(graph_module, node)
            count += 1
    return count


def _is_patch_embedding(node: Node) -> bool:
    if "ptq4vit_op" not in node.meta or len(node.args) != 7:
        return False
    _, weight, _, stride, padding, dilation, groups = node.args
    source = weight.args[0]  # type: ignore[union-attr]
    if not isinstance(source, Node) or source.op != "get_attr":
        return False
    kernel = source.meta["tensor_meta"].shape[2:]
    height, width = _image(node).meta["tensor_meta"].shape[2:]
    unpadded = padding in ((0, 0), 0, "valid")
    divides = height % kernel[0] == 0 and width % kernel[1] == 0
    stride_is_kernel = tuple(stride) == tuple(kernel)  # type: ignore[arg-type]
    return bool(stride_is_kernel and unpadded and dilation == (1, 1) and groups == 1 and divides)


def _image(node: Node) -> Node:
    """Return the image that goes into the quantizer in front of the convolution."""
    image = node.args[0].args[0]  # type: ignore[union-attr]
    assert isinstance(image, Node)
    return image


def _lower(graph_module: GraphModule, node: Node) -> None:
    graph = graph_module.graph
    quantized, weight, bias = node.args[:3]
    assert isinstance(quantized, Node)
    assert isinstance(weight, Node)
    image, kernel = _image(node), weight.args[0]
    assert isinstance(kernel, Node)
    columns, channels, patch_height, patch_width = kernel.meta["tensor_meta"].shape
    _, _, height, width = image.meta["tensor_meta"].shape
    rows, cols = height // patch_height, width // patch_width

    def call(function: object, *args: object) -> Node:
        return adopt_meta(graph.call_function(function, args), node)  # type: ignore[arg-type]

    matrix = f"{kernel.target}_matrix"
    owner, _, leaf = matrix.rpartition(".")
    value = get_attribute(graph_module, str(kernel.target)).detach().reshape(columns, -1)
    graph_module.get_submodule(owner).register_buffer(leaf, value)
    with graph.inserting_before(quantized):
        split = call(torch.reshape, image, (-1, channels, rows, patch_height, cols, patch_width))
        patches = call(torch.reshape, call(torch.permute, split, (0, 2, 4, 1, 3, 5)), (-1, rows * cols, value.shape[1]))
    quantized.update_arg(0, patches)
    with graph.inserting_before(weight):
        weight.update_arg(0, adopt_meta(graph.get_attr(matrix), kernel))
    with graph.inserting_before(node):
        tokens = call(F.linear, quantized, weight, bias)
        maps = call(torch.reshape, call(torch.transpose, tokens, 1, 2), (-1, columns, rows, cols))
    tokens.meta["ptq4vit_op"] = node.meta["ptq4vit_op"]
    tokens.meta["tensor_meta"] = node.meta["tensor_meta"]  # four dimensions or three: only two are treated apart
    maps.meta["tensor_meta"] = node.meta["tensor_meta"]
    for flat in [user for user in node.users if shape_of(user)[1:] == (columns, rows * cols)]:
        for user in [user for user in flat.users if moves_only(flat) and permutation(user, 3) == [0, 2, 1]]:
            user.replace_all_uses_with(tokens)  # the model itself goes back to tokens
    node.replace_all_uses_with(maps)
    graph.erase_node(node)
