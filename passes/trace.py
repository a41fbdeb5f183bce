"""Trace a float vision transformer into a GraphModule whose only input is the image batch."""

from __future__ import annotations

import copy
import linecache
import traceback
from typing import Any

import timm.models
import torch
from torch import nn
from torch.fx import GraphModule, Tracer

from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.contract import Rewrite, enter
from ptq4vit_fx.passes.stages import Stage


def trace(model: nn.Module) -> GraphModule:
    """Return a traced copy of `model` in evaluation mode; the model itself is never touched.

    The graph has one placeholder, the image batch (batch, channels, height, width): other arguments of `forward`
    keep their defaults. Raises PTQError (module path, source line, what to do) if the model cannot be traced.
    """
    root = _image_only(copy.deepcopy(model).eval().requires_grad_(False))
    tracer = _ViTTracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise failure(
            "trace",
            f"module {tracer.failed_at or '(root)'!r} of {type(model).__name__}, {_source_line(error)}",
            expected="a forward without control flow that depends on tensor values",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            do="rewrite that line without the dependence, or move it into a function registered with torch.fx.wrap",
        ) from error
    graph_module = GraphModule(root, graph, class_name=type(model).__name__)
    enter(graph_module, Stage.TRACED, Rewrite("trace", len(graph.nodes)))
    return graph_module


def _image_only(model: nn.Module) -> nn.Module:
    """Give the instance a forward that takes the image alone, keeping it the root, so that paths stay short."""
    original = type(model)

    def forward(self: nn.Module, x: torch.Tensor) -> Any:
        return original.forward(self, x)

    model.__class__ = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})
    return model


class _ViTTracer(Tracer):
    """A tracer that knows timm's own registries of untraceable modules and functions."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(timm.models.get_notrace_functions()), param_shapes_constant=True)
        self._leaves = tuple(timm.models.get_notrace_modules())
        self.failed_at: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_at is None:  # the innermost module fails first
                self.failed_at = self.path_of_module(m)
            raise


def _source_line(error: BaseException) -> str:
    """Return `file:line: source` of the deepest frame outside of torch."""
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if "/torch/" not in frame.f_code.co_filename and not frame.f_code.co_filename.endswith("trace.py")
    ]
    if not frames:
        return "source line unknown"
    filename, line = frames[-1]
    return f"{filename}:{line}: {linecache.getline(filename, line).strip()}"
