"""One canonical form: products are F.linear, F.conv2d, torch.matmul; activations functions of F.

A product has exactly the positional arguments of `ptq4vit_fx/product_forms.py`; activations are those of
`ptq4vit_fx/activations.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.activations import BY_MODULE, FUNCTIONS, SPELLINGS
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.product_forms import form_of

#: What replaces a node: (function, positional arguments, keyword arguments).
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@graph_pass(before=Stage.TRACED, after=Stage.CANONICAL)
def canonicalize(graph_module: GraphModule) -> int:
    """Rewrite every product and activation into its canonical function; the numbers do not change by one bit.

    A subclass of nn.Linear or nn.Conv2d with a forward of its own is traced through before this pass, so only
    plain ones arrive here; a convolution with a padding mode other than zeros is left as a module.
    """
    modules = dict(graph_module.named_modules())
    count = 0
    for node in list(graph_module.graph.nodes):
        call = _canonical_call(node, modules)
        if call is not None:
            function, args, kwargs = call
            replace(node, Writer(node)(function, *args, **kwargs))
            count += 1
    return count


def _canonical_call(node: Node, modules: dict[str, nn.Module]) -> Call | None:
    if node.op == "call_module":
        return _from_module(node, modules[str(node.target)])
    if node.op not in ("call_method", "call_function"):
        return None
    form = form_of(node.target)
    if form is not None:
        args = form.bind(node.args, node.kwargs)
        is_canonical = args is None or (node.target is form.function and args == node.args and not node.kwargs)
        return None if is_canonical else (form.function, args or (), {})
    if node.target in (torch.softmax, "softmax"):
        return _softmax(*node.args, **node.kwargs)
    if node.target in SPELLINGS:
        return SPELLINGS[node.target], node.args, dict(node.kwargs)
    if node.target in FUNCTIONS and node.target is not F.softmax and len(node.args) > 1:
        return node.target, node.args[:1], {"inplace": node.args[1]}
    return None


def _softmax(input: Any, dim: Any = None, dtype: Any = None, **_: Any) -> Call:
    return F.softmax, (input,), {"dim": dim} if dtype is None else {"dim": dim, "dtype": dtype}


def _from_module(node: Node, module: nn.Module) -> Call | None:
    """Return the call of a module of torch.nn; the type itself, since a subclass may compute anything."""
    kind = type(module)
    if kind in BY_MODULE:
        activation = BY_MODULE[kind]
        settings = {name: getattr(module, name) for name in activation.settings}
        inplace = {"inplace": True} if getattr(module, "inplace", False) else {}
        assert activation.function is not None
        return activation.function, (_input(node),), settings | inplace
    if kind not in (nn.Linear, nn.Conv2d, nn.LayerNorm) or getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    write = Writer(node)

    def parameter(name: str) -> Node | None:
        return None if getattr(module, name) is None else write.attribute(f"{node.target}.{name}")

    weight, bias = parameter("weight"), parameter("bias")
    if isinstance(module, nn.LayerNorm):
        norm = {"weight": weight, "bias": bias, "eps": module.eps}
        return F.layer_norm, (_input(node), module.normalized_shape), norm
    if isinstance(module, nn.Conv2d):
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        return F.conv2d, (_input(node), weight, bias, *geometry), {}
    return F.linear, (_input(node), weight, bias), {}


def _input(node: Node) -> Any:
    return node.args[0] if node.args else node.kwargs["input"]
