"""Run the graph once on the example: note every value's shape and how many multiplications each node does."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils.flop_counter import FlopCounterMode

from ptq4vit_fx.errors import failure

#: Multiply-additions of matrix products and convolutions that the node ran, whatever it is: nothing multiplies unseen.
MULTIPLIES = "ptq4vit_multiplies"

#: torch.nn's modules that are one product; others (nn.MultiheadAttention) are several, and can be opened.
SINGLE_PRODUCTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


def _count_attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the floating-point operations (two per multiplication) of attention over (batch, heads, tokens, dim)."""
    *outer, rows, inner = query
    return 2 * math.prod(outer) * rows * key[-2] * (inner + value[-1])


#: FlopCounterMode knows the fused attention of every device but this one.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}


@contextlib.contextmanager
def without_fast_attention() -> Iterator[None]:
    """Let nn.MultiheadAttention compute by separate operators: its fast path is one, which nothing can look into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def record_shapes(graph_module: GraphModule, example_inputs: Sequence[Tensor]) -> None:
    """Set `tensor_meta` and the multiplications on every node. Raises PTQError if the model rejects the example."""
    device = next((p.device for p in graph_module.parameters()), example_inputs[0].device)
    try:
        with (
            torch.no_grad(),
            without_fast_attention(),
            FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
        ):
            _Recorder(graph_module, counter).propagate(*(x.to(device) for x in example_inputs))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise failure(
            "prepare_fx",
            f"example_inputs of shape {', '.join(str(tuple(x.shape)) for x in example_inputs)}",
            expected="a size that the model accepts",
            got=str(error.__cause__ or error).splitlines()[0],
            do="use the model's input size, or create it with img_size=",
        ) from error
    graph_module.meta["ptq4vit_example_batch"] = len(example_inputs[0])


class _Recorder(ShapeProp):
    def __init__(self, graph_module: GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(graph_module)
        self._counter = counter

    def run_node(self, n: Node) -> Any:
        before = self._counter.get_total_flops()
        result = super().run_node(n)
        n.meta[MULTIPLIES] = (self._counter.get_total_flops() - before) // 2
        return result


def hides_products(graph_module: GraphModule, node: Node) -> bool:
    """Return whether a recorded node is a module or a function of the model's own that multiplies matrices inside."""
    if not node.meta.get(MULTIPLIES):
        return False
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return not (isinstance(module, SINGLE_PRODUCTS) and type(module).__module__.startswith("torch.nn"))
    return isinstance(node.target, types.FunctionType) and not node.target.__module__.startswith("torch.")
