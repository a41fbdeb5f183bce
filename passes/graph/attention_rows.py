"""What attention does to channels of keys and values: whether a shift of all of them is seen behind it."""

from __future__ import annotations

import operator
from typing import cast

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.channels import is_observer, positive_factor, readers_of, written_by
from ptq4vit_fx.passes.graph.dataflow import call_name
from ptq4vit_fx.passes.graph.shapes import is_tensor, shape_of

ADDITIONS = (torch.add, operator.add, operator.iadd, "add", torch.ops.aten.add.Tensor)
#: What keeps the last dimension, if that is as long behind it.
KEEPS_ROWS = frozenset({"reshape", "view", "contiguous", "flatten", "unflatten", "unsqueeze", "squeeze", "clone"})


def rows_sum_to_one(graph_module: GraphModule, node: Node) -> bool | None:
    """Return whether each row of a product's left operand is a whole softmax; None if it comes out of none."""
    left = cast("Node", node.args[0])
    source = written_by(graph_module, left)
    if source.target is not F.softmax:
        return None
    if source.kwargs.get("dim") not in (-1, len(shape_of(source)) - 1):
        return False
    mine = [r for r in readers_of(graph_module, source, scaled=False) if r.node is node and r.value is left]
    keys = shape_of(source)[-1]
    if not mine or mine[0].numbers.shape[-1] != keys:
        return False
    found = mine[0].numbers.sort(-1).values
    return torch.equal(found, torch.arange(keys, dtype=found.dtype).expand(found.shape))


def shifts_keys(graph_module: GraphModule, node: Node) -> bool:
    """Return whether all that becomes of scores is a softmax over the keys: what all keys share goes unseen there.

    On the way they may be multiplied by a positive number, added to what does not depend on them, and masked.
    """
    waiting, seen = [node], {node}
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if user in seen or (is_observer(graph_module, user) and user.args[3] is not value):
                continue
            if user.target is F.softmax and user.kwargs.get("dim") in (-1, len(shape_of(user)) - 1):
                continue
            if not is_tensor(user):
                if user.op == "output" or any(is_tensor(reader) for reader in user.users):
                    return False
                continue  # a size
            if not _keeps_rows_of_scores(graph_module, user, value, seen):
                return False
            seen.add(user)
            waiting.append(user)
    return True


def _keeps_rows_of_scores(graph_module: GraphModule, user: Node, value: Node, seen: set[Node]) -> bool:
    if is_observer(graph_module, user) or positive_factor(graph_module, user) is not None:
        return True
    name = call_name(user)
    if name in KEEPS_ROWS and user.args[0] is value:
        return shape_of(user)[-1] == shape_of(value)[-1]
    if user.target in ADDITIONS or getattr(user.target, "__name__", "") == "add_mask":
        return sum(operand in seen for operand in user.all_input_nodes) == 1 and not user.kwargs
    if name == "masked_fill" and user.args[0] is value:
        fills_whole_rows = shape_of(cast("Node", user.args[1]))[-1:] == (1,)
        return fills_whole_rows or bool(user.args[2] == float("-inf"))
    return False
