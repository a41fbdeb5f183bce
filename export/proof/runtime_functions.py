"""The simulation with the float functions of ONNX Runtime in the place of PyTorch's.

Two libraries compute LayerNorm, softmax and GELU differently in the last bit. Where a value lies between two codes,
that bit decides which one it becomes, and every later layer multiplies the difference. A comparison that wants to know
whether a file computes what was simulated takes these functions from the same library on both sides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import Argument, Target

from ptq4vit_fx.export.float_types import compute_in_float32
from ptq4vit_fx.export.proof.runtime import open_model

#: The types that the runtime and NumPy have; what is in another one is left to PyTorch.
TYPES = (torch.float32, torch.float64, torch.float16)
#: The newest opset in which one of these functions changed (Gelu).
OPSET = 20


class RuntimeFunctions(Interpreter):
    """Runs a converted model in PyTorch, but layer_norm, softmax and gelu in ONNX Runtime's kernels.

    An addition in front of one of them runs in the same session, because the runtime may fuse the two into a kernel
    with another last bit (SkipLayerNormalization, BiasGelu). The result is on the CPU; all other nodes run as they
    are, and so do functions of values in several types, or in one that is not of TYPES.
    """

    def __init__(self, converted: GraphModule) -> None:
        super().__init__(converted)
        self._sessions: dict[tuple[Any, ...], onnxruntime.InferenceSession] = {}
        self._translations: dict[Any, Callable[..., Tensor]] = {
            F.layer_norm: self._layer_norm,
            F.softmax: self._softmax,
            F.gelu: self._gelu,
        }
        self._fusible = {
            node.args[0]
            for node in converted.graph.nodes
            if node.target in self._translations and _is_sum_for_one_user(node.args[0])
        }

    def run_node(self, n: Node) -> Any:
        if n in self._fusible:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return _Sum(*args)
        return super().run_node(n)

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        translation = self._translations.get(target)
        if translation is not None and _type_of((*args, *kwargs.values())) in TYPES:
            return translation(*args, **kwargs)
        plain = tuple(x.lhs + x.rhs if isinstance(x, _Sum) else x for x in args)
        return super().call_function(target, plain, kwargs)

    def _layer_norm(
        self,
        x: Tensor | _Sum,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        dtype = _type_of((x,))
        scale = torch.ones(tuple(normalized_shape), dtype=dtype) if weight is None else weight
        offset = torch.zeros(tuple(normalized_shape), dtype=dtype) if bias is None else bias
        return self._run("LayerNormalization", x, scale, offset, axis=-len(normalized_shape), epsilon=eps)

    def _softmax(self, x: Tensor | _Sum, dim: int = -1, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        if dtype not in (None, _type_of((x,))):
            x = (x.lhs + x.rhs if isinstance(x, _Sum) else x).to(dtype)
        return self._run("Softmax", x, axis=dim)

    def _gelu(self, x: Tensor | _Sum, approximate: str = "none") -> Tensor:
        return self._run("Gelu", x, approximate=approximate)

    def _run(self, name: str, x: Tensor | _Sum, *others: Tensor, **attributes: Any) -> Tensor:
        first = [x.lhs, x.rhs] if isinstance(x, _Sum) else [x]
        arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in (*first, *others)]
        shapes, kind = tuple(array.shape for array in arrays), ir.DataType.from_numpy(arrays[0].dtype)
        key = (name, len(first), shapes, kind, *attributes.items())
        if key not in self._sessions:
            self._sessions[key] = _session(name, len(first), shapes, kind, attributes)
        return torch.from_numpy(self._sessions[key].run(None, {f"x{i}": array for i, array in enumerate(arrays)})[0])


@dataclass(frozen=True)
class _Sum:
    """An addition that is left to the session of the function that reads it."""

    lhs: Tensor
    rhs: Tensor


def _is_sum_for_one_user(node: Any) -> bool:
    if not isinstance(node, Node) or node.target not in (torch.add, operator.add) or len(node.users) != 1:
        return False
    return len(node.args) == 2 and all(isinstance(arg, Node) for arg in node.args) and not node.kwargs


def _type_of(arguments: Iterable[Any]) -> torch.dtype | None:
    """Return the type of the tensors among arguments, None if they have several."""
    tensors = [t for x in arguments for t in ((x.lhs, x.rhs) if isinstance(x, _Sum) else (x,)) if isinstance(t, Tensor)]
    types = {tensor.dtype for tensor in tensors}
    return types.pop() if len(types) == 1 else None


def _session(
    name: str, terms: int, shapes: tuple[tuple[int, ...], ...], kind: ir.DataType, attributes: dict[str, Any]
) -> onnxruntime.InferenceSession:
    """Return a session that runs one operator on inputs x0, x1, ..., the first two added if terms is 2."""
    inputs = [ir.val(f"x{number}", kind, shape) for number, shape in enumerate(shapes)]
    nodes = [ir.node("Add", inputs[:2])] if terms == 2 else []
    first = nodes[0].outputs[0] if nodes else inputs[0]
    nodes.append(ir.node(name, [first, *inputs[terms:]], attributes, outputs=[ir.val("y", kind)]))
    graph = ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, opset_imports={"": OPSET}, name=name)
    model = ir.Model(graph, ir_version=9)
    compute_in_float32(model)  # as in every file
    return open_model(model)
