"""The simulation with the float functions of ONNX Runtime in the place of PyTorch's.

Two libraries compute LayerNorm, softmax and GELU differently in the last bit. Where a value lies between two codes,
that bit decides which one it becomes, and every later layer multiplies the difference. A comparison that wants to know
whether a file computes what was simulated takes these functions from the same library on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.node import Argument, Target

from ptq4vit_fx.export.runtime import quiet_options

#: The newest opset in which one of these functions changed (Gelu).
OPSET = 20


class RuntimeFunctions(Interpreter):
    """Runs a converted model in PyTorch, but layer_norm, softmax and gelu in ONNX Runtime's kernels.

    The result is float32 on the CPU; all other nodes run as they are.
    """

    def __init__(self, converted: GraphModule) -> None:
        super().__init__(converted)
        self._sessions: dict[tuple[Any, ...], onnxruntime.InferenceSession] = {}
        self._translations: dict[Any, Callable[..., Tensor]] = {
            F.layer_norm: self._layer_norm,
            F.softmax: self._softmax,
            F.gelu: self._gelu,
        }

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        translation = self._translations.get(target)
        return super().call_function(target, args, kwargs) if translation is None else translation(*args, **kwargs)

    def _layer_norm(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        scale = torch.ones(tuple(normalized_shape)) if weight is None else weight
        offset = torch.zeros(tuple(normalized_shape)) if bias is None else bias
        return self._run("LayerNormalization", [x, scale, offset], axis=-len(normalized_shape), epsilon=eps)

    def _softmax(self, x: Tensor, dim: int = -1, **_: Any) -> Tensor:
        return self._run("Softmax", [x], axis=dim)

    def _gelu(self, x: Tensor, approximate: str = "none") -> Tensor:
        return self._run("Gelu", [x], approximate=approximate)

    def _run(self, operator: str, tensors: list[Tensor], **attributes: Any) -> Tensor:
        key = (operator, len(tensors), *attributes.items())
        if key not in self._sessions:
            self._sessions[key] = _session(operator, len(tensors), attributes)
        feeds = {f"x{i}": tensor.detach().cpu().contiguous().numpy() for i, tensor in enumerate(tensors)}
        return torch.from_numpy(self._sessions[key].run(None, feeds)[0])


def _session(operator: str, inputs: int, attributes: dict[str, Any]) -> onnxruntime.InferenceSession:
    """Return a session that runs one operator on inputs x0, x1, ..."""
    names = [f"x{number}" for number in range(inputs)]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], **attributes)],
        operator,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), quiet_options(), providers=["CPUExecutionProvider"])
