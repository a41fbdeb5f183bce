"""One spelling per operation: products are F.linear, F.conv2d, torch.matmul; activations functions of F."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import adopt_meta
from ptq4vit_fx.passes.graph.stages import Stage

#: What replaces a node: (function, positional arguments, keyword arguments).
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

MATMUL_FUNCTIONS = {operator.matmul, torch.bmm}
MATMUL_METHODS = {"matmul", "bmm", "__matmul__"}
SOFTMAX_FUNCTIONS = {torch.softmax}
#: Parameters of products that may be passed by name.
PRODUCT_PARAMETERS = {
    F.linear: ("input", "weight", "bias"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    torch.matmul: ("input", "other"),
}
CONVOLUTION_DEFAULTS = [None, None, None, (1, 1), (0, 0), (1, 1), 1]
ACTIVATION_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.SiLU: F.silu,
    nn.Hardswish: F.hardswish,
    nn.ReLU: F.relu,
    nn.ReLU6: F.relu6,
    nn.Hardsigmoid: F.hardsigmoid,
    nn.Sigmoid: torch.sigmoid,
}
#: Functions and methods of one argument; those of F may overwrite it (`inplace`).
ACTIVATIONS: dict[Any, Callable[..., Any]] = {
    torch.relu: F.relu,
    "relu": F.relu,
    F.sigmoid: torch.sigmoid,
    "sigmoid": torch.sigmoid,
}


@graph_pass(before=Stage.TRACED, after=Stage.CANONICAL)
def canonicalize(graph_module: GraphModule) -> int:
    """Rewrite every product and activation into its canonical function; the numbers do not change by one bit.

    A subclass of nn.Linear or nn.Conv2d with a forward of its own is traced through before this pass, so only
    plain ones arrive here; a convolution with a padding mode other than zeros is left as a module.
    """
    modules = dict(graph_module.named_modules())
    count = 0
    for node in list(graph_module.graph.nodes):
        with graph_module.graph.inserting_before(node):
            call = _canonical_call(graph_module, node, modules)
            if call is None:
                continue
            function, args, kwargs = call
            replacement = adopt_meta(graph_module.graph.call_function(function, args, kwargs), node)
        node.replace_all_uses_with(replacement)
        graph_module.graph.erase_node(node)
        count += 1
    return count


def _canonical_call(graph_module: GraphModule, node: Node, modules: dict[str, nn.Module]) -> Call | None:
    if node.op == "call_module":
        return _from_module(graph_module, node, modules[str(node.target)])
    if node.op in ("call_method", "call_function"):
        if node.target in ACTIVATIONS:
            return ACTIVATIONS[node.target], node.args, dict(node.kwargs)
        if node.target in ACTIVATION_MODULES.values() and len(node.args) > 1:
            return node.target, node.args[:1], {"inplace": node.args[1]}  # type: ignore[return-value]
    if node.op == "call_method":
        if node.target in MATMUL_METHODS:
            return torch.matmul, node.args, {}
        if node.target == "softmax":
            return _softmax(node.args[0], *node.args[1:], **node.kwargs)
    if node.op == "call_function":
        if node.target in MATMUL_FUNCTIONS:
            return torch.matmul, (node.args[0], node.args[1]), {}
        if node.target in SOFTMAX_FUNCTIONS:
            return _softmax(node.args[0] if node.args else node.kwargs["input"], *node.args[1:], **node.kwargs)
        function = F.conv2d if node.target is torch.conv2d else node.target
        if function in PRODUCT_PARAMETERS:
            return _by_position(function, node)
    return None


def _by_position(function: Any, node: Node) -> Call | None:
    """Return the call with the keyword arguments that come next in line as positional ones."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in PRODUCT_PARAMETERS[function][len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    if function is F.conv2d and not kwargs:
        args += CONVOLUTION_DEFAULTS[len(args) :]
        args[3:6] = [value if isinstance(value, str) else _pair(value) for value in args[3:6]]
    unchanged = function is node.target and args == list(node.args)
    return None if unchanged else (function, tuple(args), kwargs)


def _pair(value: Any) -> tuple[Any, ...]:
    return (value, value) if isinstance(value, int) else tuple(value) * (3 - len(value))


def _softmax(x: Any, dim: Any = None, dtype: Any = None, **_: Any) -> Call:
    return F.softmax, (x,), {"dim": dim} if dtype is None else {"dim": dim, "dtype": dtype}


def _from_module(graph_module: GraphModule, node: Node, module: nn.Module) -> Call | None:
    x = node.args[0] if node.args else node.kwargs["input"]

    def parameter(name: str) -> Node | None:
        if getattr(module, name) is None:
            return None
        return adopt_meta(graph_module.graph.get_attr(f"{node.target}.{name}"), node)

    if type(module) is nn.Linear:
        return F.linear, (x, parameter("weight"), parameter("bias")), {}
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        return F.conv2d, (x, parameter("weight"), parameter("bias"), *geometry), {}
    if type(module) is nn.LayerNorm:
        norm = {"weight": parameter("weight"), "bias": parameter("bias"), "eps": module.eps}
        return F.layer_norm, (x, module.normalized_shape), norm
    if isinstance(module, nn.Softmax):
        return F.softmax, (x,), {"dim": module.dim}
    if isinstance(module, nn.GELU):
        return F.gelu, (x,), {"approximate": module.approximate}
    if type(module) in ACTIVATION_MODULES:
        inplace = {"inplace": True} if getattr(module, "inplace", False) else {}
        return ACTIVATION_MODULES[type(module)], (x,), inplace
    return None
