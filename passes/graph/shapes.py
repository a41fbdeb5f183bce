"""The shape of every value, and how many multiplications every node does: computed, never noted by hand.

`record_shapes` runs the model once on the example. From then on every pass ends with `propagate_shapes`, which computes
what changed on fake tensors: a node is computed again if its call or the shape of one of its operands is another.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils.flop_counter import FlopCounterMode

from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.graph.dataflow import get_attribute
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.opaque import OPAQUE, OperatorWatch
from ptq4vit_fx.torch_state import without_fast_attention

#: Multiply-additions of matrix products and convolutions that the node ran, whatever it is: nothing multiplies unseen.
MULTIPLIES = "ptq4vit_multiplies"
#: The result of a node, its tensors as `Shape`; torch's own key, so that its printers show it.
RESULT = "tensor_meta"
#: The call that the result belongs to.
CALL = "ptq4vit_call"
#: Where a GraphModule keeps the results of calls that were computed.
KNOWN = "ptq4vit_known_results"
EXAMPLE_BATCH = "ptq4vit_example_batch"
#: Where a placeholder notes that the graph writes into the tensor that it is given.
WRITTEN = "ptq4vit_written"

#: Results other than tensors that are kept as they are.
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)

#: torch.nn's modules that are one operator; others (nn.MultiheadAttention) are several, and can be opened.
SINGLE_PRODUCTS = (nn.Linear, nn.Bilinear, nn.LSTM, nn.modules.conv._ConvNd)

aten = torch.ops.aten


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor in a graph, on the example."""

    shape: torch.Size
    dtype: torch.dtype


def shape_of(node: Node) -> tuple[int, ...]:
    """Return the shape of a node's value on the example, () for what is no tensor."""
    return tuple(getattr(node.meta.get(RESULT), "shape", ()))


def dtype_of(node: Node) -> torch.dtype | None:
    """Return the type of a node's value on the example, None for what is no tensor."""
    return getattr(node.meta.get(RESULT), "dtype", None)


def is_tensor(node: Any) -> TypeGuard[Node]:
    """Return whether this is a node whose value is one tensor of known shape."""
    return isinstance(node, Node) and isinstance(node.meta.get(RESULT), Shape)


def has_shapes(graph_module: GraphModule) -> bool:
    """Return whether the graph was run on an example."""
    return EXAMPLE_BATCH in graph_module.meta


def _count_attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the floating-point operations (two per multiplication) of attention over (batch, heads, tokens, dim)."""
    *outer, rows, inner = query
    return 2 * math.prod(outer) * rows * key[-2] * (inner + value[-1])


def _count_first(first: torch.Size, *_: Any, **__: Any) -> int:
    """Return two per value of the first operand, the least that an operator does which multiplies and adds them."""
    return 2 * math.prod(first)


def _count_distances(first: torch.Size, second: torch.Size, p: float = 2, *_: Any, **__: Any) -> int:
    """Return the operations of all pairs' distances, (..., n, dim) and (..., m, dim); only 2-norms multiply."""
    return 2 * math.prod(first) * second[-2] if p == 2 else 0


#: Operators that multiply and add, with their floating-point operations, or the least of them: FlopCounterMode knows
#: matrix products of two matrices, convolutions, and the fused attention of other devices.
UNCOUNTED: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    aten._cdist_forward: _count_distances,
    aten._euclidean_dist: _count_distances,
    **dict.fromkeys(
        (
            *(aten.mv, aten.addmv, aten.dot, aten.vdot, aten.addbmm, aten._int_mm, aten._sparse_addmm),
            *(aten._trilinear, aten.conv_tbc),
            *(aten.mkldnn_rnn_layer, aten._cudnn_rnn, aten.miopen_rnn),
            *(aten.linalg_matrix_exp, aten.linalg_householder_product, aten._linalg_solve_ex, aten.linalg_inv_ex),
            *(aten.linalg_solve_triangular, aten.triangular_solve, aten.cholesky_solve, aten.cholesky_inverse),
        ),
        _count_first,
    ),
}


@exclusive()
def record_shapes(graph_module: GraphModule, example_inputs: Sequence[Tensor]) -> None:
    """Run the graph on the example and note every result. Raises PTQError if the model rejects the example."""
    device = _device(graph_module, example_inputs[0].device)
    given = [x.to(device).clone() for x in example_inputs]
    try:
        with torch.no_grad(), without_fast_attention(), _flop_counter() as counter, OperatorWatch() as watch:
            _Recorder(graph_module, counter, watch, whole=True).run(*given)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise failure(
            "prepare_fx",
            f"example_inputs of shape {', '.join(str(tuple(x.shape)) for x in example_inputs)}",
            expected="a size that the model accepts",
            got=str(error.__cause__ or error).splitlines()[0],
            do="use the model's input size, or create it with img_size=",
        ) from error
    graph_module.meta[EXAMPLE_BATCH] = len(example_inputs[0])
    placeholders = (node for node in graph_module.graph.nodes if node.op == "placeholder")
    for node, now, before in zip(placeholders, given, example_inputs, strict=False):
        # a tensor counts what writes into it or a view of it, except through x.data
        node.meta[WRITTEN] = now._version > 0 or not torch.equal(now.nan_to_num(), before.to(device).nan_to_num())


def propagate_shapes(graph_module: GraphModule, pass_name: str) -> None:
    """Compute the results of nodes that were inserted, or whose operands have other shapes now.

    A graph that was never run has none. Raises PTQError, naming the pass, on a call that does not fit its operands.
    """
    if not has_shapes(graph_module):
        return
    known = graph_module.meta.setdefault(KNOWN, {})
    with _on_fake_tensors(graph_module) as recorder:
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                node.meta[RESULT] = _described(get_attribute(graph_module, str(node.target)))
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            call = call_of(node)
            if node.meta.get(CALL) == call:
                continue
            key = _key(graph_module, node, call)
            if key not in known:
                known[key] = _computed(recorder, node, pass_name)
            node.meta[RESULT], node.meta[MULTIPLIES], node.meta[OPAQUE] = known[key]
            node.meta[CALL] = call


@contextmanager
def _on_fake_tensors(graph_module: GraphModule) -> Iterator[_Recorder]:
    """Give what runs single nodes on tensors that have a shape and no values."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        without_fast_attention(),
        _flop_counter() as counter,
        OperatorWatch() as watch,
    ):
        yield _Recorder(graph_module, counter, watch, whole=False)


def _computed(recorder: _Recorder, node: Node, pass_name: str) -> tuple[Any, int, str]:
    """Return the result of a node, its multiplications and what it hides."""
    try:
        return recorder.recompute(node)
    except Exception as error:
        raise failure(
            f"pass {pass_name}",
            f"node {node.name}",
            expected=f"operands that {node._pretty_print_target(node.target)} takes",
            got=str(error.__cause__ or error).splitlines()[0],
            do="report this as a bug in that pass",
        ) from error


class _Recorder(Interpreter):
    """Runs nodes, and notes for each its result, its call, its multiplications, and what it hides."""

    def __init__(
        self, graph_module: GraphModule, counter: FlopCounterMode, watch: OperatorWatch, *, whole: bool
    ) -> None:
        super().__init__(graph_module, garbage_collect_values=whole)
        self._counter, self._watch = counter, watch
        self._of = _device(graph_module, torch.device("cpu"))
        self.extra_traceback = False

    def run_node(self, n: Node) -> Any:
        before = self._counter.get_total_flops()
        operands = self.fetch_args_kwargs_from_env(n)
        self._watch.start()
        result = super().run_node(n)
        n.meta[OPAQUE] = self._watch.hidden_in(n, operands, result)
        n.meta[MULTIPLIES] = (self._counter.get_total_flops() - before) // 2
        n.meta[RESULT] = _described(result)
        if n.op not in ("placeholder", "get_attr", "output"):
            n.meta[CALL] = call_of(n)
        return result

    def recompute(self, node: Node) -> tuple[Any, int, str]:
        """Run one node on operands of known shapes; return its result, its multiplications, and what it hides."""
        for operand in node.all_input_nodes:
            self.env[operand] = _empty(operand.meta.get(RESULT), self._of)
        self.run_node(node)
        return node.meta[RESULT], node.meta[MULTIPLIES], node.meta[OPAQUE]


def example_of(graph_module: GraphModule, node: Node) -> Any:
    """Return what a node gives on the example: numbers as they are, parameters too, other tensors of any values."""
    if node.op == "get_attr":
        return get_attribute(graph_module, str(node.target))
    return _empty(node.meta.get(RESULT), torch.device("cpu"))


def _empty(result: Any, device: torch.device) -> Any:
    def leaf(x: Any) -> Any:
        return torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, Shape) else x

    return result if isinstance(result, torch.Size) else map_aggregate(result, leaf)


def _described(result: Any) -> Any:
    """Return a result with `Shape` in the place of every tensor, and the type in that of any other object."""
    return result if isinstance(result, torch.Size) else map_aggregate(result, _described_leaf)


def _described_leaf(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Shape(x.shape, x.dtype)
    return x if isinstance(x, PLAIN) else type(x)


def call_of(node: Node) -> tuple[Any, ...]:
    """Return what the result of a node depends on: its call, with the results of its operands."""
    return (node.op, node.target, *map_arg((node.args, node.kwargs), lambda n: n.meta.get(RESULT)))


def _key(graph_module: GraphModule, node: Node, call: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what tells a call from all others of this graph: the blocks of a transformer make the same ones."""
    target: Any = node.target
    if node.op == "call_module":
        module = graph_module.get_submodule(target)
        if type(module).__module__.startswith("ptq4vit_fx."):  # a quantizer or an observer
            target = (type(module), *(tensor.shape for tensor in module.buffers()))
    return (node.op, target, repr(call[2:]))


def _flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=UNCOUNTED)


def _device(graph_module: GraphModule, otherwise: torch.device) -> torch.device:
    return next((p.device for p in graph_module.parameters()), otherwise)


def hides_products(graph_module: GraphModule, node: Node) -> bool:
    """Return whether a recorded node is a module or a function of the model's own that multiplies matrices inside."""
    if not node.meta.get(MULTIPLIES):
        return False
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return not (isinstance(module, SINGLE_PRODUCTS) and type(module).__module__.startswith("torch.nn"))
    return isinstance(node.target, types.FunctionType) and not node.target.__module__.startswith("torch.")
