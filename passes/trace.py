"""Trace a float vision transformer into a GraphModule whose only inputs are its tensors, usually one image batch."""

from __future__ import annotations

import contextlib
import copy
import inspect
import linecache
import traceback
from collections.abc import Sequence
from typing import Any

import timm.layers
import timm.models
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer

from ptq4vit_fx.errors import PTQError, failure, near_names
from ptq4vit_fx.passes.graph.contract import Rewrite, enter
from ptq4vit_fx.passes.graph.outputs import plain_outputs
from ptq4vit_fx.passes.graph.shapes import hides_products, record_shapes
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.trace_by_export import trace_by_export

#: In timm's list of modules to stop at, but traceable, with an activation inside that belongs into the graph.
TRACEABLE = (timm.layers.BatchNormAct2d,)


def trace(
    model: nn.Module,
    example_inputs: Sequence[Tensor] | None = None,
    leaf_modules: Sequence[str] = (),
    names: Sequence[str] | None = None,
) -> GraphModule:
    """Return a traced copy of `model` in evaluation mode; the model itself is never touched.

    The graph has one placeholder per example input, named after the first parameters of `forward`, (one, the image
    batch, without an example): other arguments keep their defaults. Its output is `plain_outputs` of the model's. Two
    tracers are tried: torch.fx's, which keeps the model's own functions; and, given an example,
    torch.export's, where the first one fails or stops in front of a module that holds products. leaf_modules: paths
    of modules that are meant to stay closed. names: of the parameters that the inputs are given as, by keyword.
    Raises PTQError (module path, source line, what to do) if both fail.
    """
    inputs = 1 if example_inputs is None else len(example_inputs)
    root = _tensors_in_and_out(copy.deepcopy(model).eval().requires_grad_(False), inputs, names)
    tracer = _ViTTracer(leaf_modules)
    try:
        graph_module = GraphModule(root, tracer.trace(root), class_name=type(model).__name__)
    except Exception as error:
        message = _untraceable(model, tracer, error)
        if example_inputs is None:
            raise message from error
        return _entered(_export_or(message, root, example_inputs), "trace_by_export", example_inputs)
    if example_inputs is not None:
        record_shapes(graph_module, example_inputs)
        if any(
            hides_products(graph_module, node) and str(node.target) not in leaf_modules
            for node in graph_module.graph.nodes
        ):
            # What is closed in the first graph is reported by annotate if the second tracer cannot open it.
            with contextlib.suppress(Exception):
                return _entered(trace_by_export(root, example_inputs), "trace_by_export", example_inputs)
    return _entered(graph_module, "trace", None)


def _entered(graph_module: GraphModule, tracer: str, not_yet_recorded: Sequence[Tensor] | None) -> GraphModule:
    if not_yet_recorded is not None:
        record_shapes(graph_module, not_yet_recorded)
    enter(graph_module, Stage.TRACED, Rewrite(tracer, len(graph_module.graph.nodes)))
    return graph_module


def _untraceable(model: nn.Module, tracer: _ViTTracer, error: Exception) -> PTQError:
    return failure(
        "trace",
        f"module {tracer.failed_at or '(root)'!r} of {type(model).__name__}, {_source_line(error)}",
        expected="a forward without control flow that depends on tensor values",
        got=f"{type(error).__name__}: {error}".splitlines()[0],
        do="rewrite that line without the dependence, move it into a function registered with torch.fx.wrap, or keep "
        "its module closed with leaf_modules=",
    )


def _export_or(first: PTQError, root: nn.Module, example_inputs: Sequence[Tensor]) -> GraphModule:
    try:
        return trace_by_export(root, example_inputs)
    except Exception as error:
        second = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise PTQError(f"{first} (torch.export does not get through either: {second})") from error


def _tensors_in_and_out(model: nn.Module, inputs: int, keywords: Sequence[str] | None) -> nn.Module:
    """Give the instance a forward of `inputs` tensors, keeping it the root, so that paths stay short."""
    original = type(model)
    parameters = list(inspect.signature(original.forward).parameters)[1:]
    named = [name for name in parameters if name.isidentifier()][:inputs]
    names = named if len(named) == inputs and "args" not in named else [f"input_{i}" for i in range(inputs)]
    names = names if keywords is None else list(keywords)

    def call(self: nn.Module, *tensors: Tensor) -> Any:
        by_name = {} if keywords is None else dict(zip(keywords, tensors, strict=True))
        return plain_outputs(original.forward(self, **by_name) if by_name else original.forward(self, *tensors))

    # torch.fx names the placeholders after the parameters, which a lambda with that signature has
    forward = eval(f"lambda self, {', '.join(names)}: call(self, {', '.join(names)})", {"call": call})
    model.__class__ = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})
    return model


class _ViTTracer(Tracer):
    """A tracer that knows timm's own registries of untraceable modules and functions."""

    def __init__(self, leaf_modules: Sequence[str] = ()) -> None:
        super().__init__(autowrap_functions=tuple(timm.models.get_notrace_functions()), param_shapes_constant=True)
        self._leaves = tuple(timm.models.get_notrace_modules())
        self._leaf_paths = frozenset(leaf_modules)
        self.failed_at: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._leaf_paths:
            return True
        if isinstance(m, TRACEABLE):
            return False
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


def module_paths(model: nn.Module, leaf_modules: Sequence[str | type[nn.Module]]) -> tuple[str, ...]:
    """Return the paths of the modules that a type or a path names. Raises PTQError (near names) if it names none."""
    modules = {name: module for name, module in model.named_modules() if name}
    paths: list[str] = []
    for leaf in leaf_modules:
        if isinstance(leaf, str):
            found, known = [leaf] if leaf in modules else [], list(modules)
        else:
            found = [name for name, module in modules.items() if isinstance(module, leaf)]
            known = sorted({type(module).__name__ for module in modules.values()})
        if not found:
            name = leaf if isinstance(leaf, str) else leaf.__name__
            do = f"near names: {near_names(name, known)}"
            raise failure("prepare_fx", "leaf_modules", expected="a module of the model", got=repr(name), do=do)
        paths += found
    return tuple(dict.fromkeys(paths))
