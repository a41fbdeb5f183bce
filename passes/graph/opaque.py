"""Calls that nothing can look into: whatever they multiply stays float, and is listed."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What hides products in a node: the name of an operator or of a function, "" where nothing is hidden.
OPAQUE = "ptq4vit_opaque"

#: Namespaces of operators that are no products, or whose multiplications are counted.
KNOWN_NAMESPACES = frozenset({"aten", "prim", "prims", "profiler", "ptq4vit_fx", "torchvision"})
#: The product among torchvision's operators; the others select and average.
KNOWN_PRODUCTS = frozenset({"torchvision::deform_conv2d"})
#: Operators of torch that compute nothing: with these alone, a result comes from elsewhere.
MOVING = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "zeros_like", "detach", "alias", "lift_fresh", "_to_copy"}
)


class OperatorWatch(TorchDispatchMode):
    """Notes which operators run that are not torch's own and read two tensors, and whether torch computes at all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.opaque, self.computes = "", False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split(".")[0] if isinstance(func, torch._ops.OpOverload) else str(func)
        namespace, _, leaf = name.partition("::")
        if namespace not in KNOWN_NAMESPACES or name in KNOWN_PRODUCTS:
            self.computes = True
            if sum(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))) > 1:
                self.opaque = self.opaque or name
        elif leaf not in MOVING:
            self.computes = True
        return func(*args, **(kwargs or {}))

    def start(self) -> None:
        """Forget what was seen."""
        self.opaque, self.computes = "", False

    def hidden_in(self, node: Node, operands: Any, result: Any) -> str:
        """Return what the node that ran since `start` hides, "" if nothing."""
        if self.opaque or self.computes or not is_foreign(node.target):
            return self.opaque
        reads = sum(isinstance(x, Tensor) for x in tree_leaves(operands))
        makes = any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(result))
        return str(getattr(node.target, "__name__", node.target)) if reads > 1 and makes else ""


def is_foreign(target: Any) -> bool:
    """Return whether this is a function of neither torch nor Python: of an extension, or of the model's own."""
    if not isinstance(target, types.FunctionType | types.BuiltinFunctionType):
        return False
    module = target.__module__ or "torch"
    return module.split(".")[0] not in ("torch", "_operator", "builtins", "math", "ptq4vit_fx")
