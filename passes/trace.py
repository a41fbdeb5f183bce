"""Trace a float vision transformer into a GraphModule whose only inputs are its tensors, usually one image batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm.layers
import timm.models
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer
from torch.nn.modules import module as global_hooks

from ptq4vit_fx.errors import PTQError, failure, near_names
from ptq4vit_fx.inputs.batches import FIXED_BATCH
from ptq4vit_fx.passes.graph.autocasting import autocast_left_out, warn_of_autocast
from ptq4vit_fx.passes.graph.batch_limits import batch_limits
from ptq4vit_fx.passes.graph.behaviour import BEHAVIOUR, Behaviour, behaviour_of
from ptq4vit_fx.passes.graph.causes import BATCHES, Failed, failed, neither
from ptq4vit_fx.passes.graph.contract import Rewrite, enter
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.float_model import float_model
from ptq4vit_fx.passes.graph.model_call import ModelCall, call_of, name_inputs
from ptq4vit_fx.passes.graph.model_copy import another_copy, float_copy, is_float32
from ptq4vit_fx.passes.graph.own_names import traced_module
from ptq4vit_fx.passes.graph.places import place_of
from ptq4vit_fx.passes.graph.randomness import random_numbers_kept
from ptq4vit_fx.passes.graph.shapes import hides_products, record_shapes
from ptq4vit_fx.passes.graph.silence import silence
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.graph.symbolic_sizes import symbolic_sizes
from ptq4vit_fx.passes.graph.untouched import untouched
from ptq4vit_fx.passes.trace_by_export import LARGEST_BATCH, trace_by_export, warn_of_largest_batch

#: In timm's list of modules to stop at, but traceable, with an activation inside that belongs into the graph.
TRACEABLE = (timm.layers.BatchNormAct2d,)
#: The method of the copy that is traced: a call of the copy as its user calls the model.
TRACED = "ptq4vit_traced"


@exclusive()
def trace(
    model: nn.Module,
    example_inputs: Sequence[Tensor] | None = None,
    leaf_modules: Sequence[str] = (),
    names: Sequence[str] | None = None,
) -> GraphModule:
    """Return a traced float32 copy of `model` in evaluation mode; the model itself is never touched.

    What is traced is a call of the instance: its hooks and a replaced forward are part of it. The graph has one
    placeholder per example input, named after the first parameters of `forward` (one, the image batch, without an
    example): other arguments keep their defaults. Its output is `plain_outputs` of the model's. names: of the
    parameters that the inputs are given as, by keyword. Two tracers are tried, each on a copy of its own: torch.fx's,
    which keeps the model's own functions; and, given an example, torch.export's, where the first one fails, computes
    something else than the model, or stops in front of a module that holds products. leaf_modules: paths of modules
    that are meant to stay closed. Raises PTQError (module path, source line, what to do) if both fail.
    """
    original = float_model(model)
    source = float_copy(original)
    call = call_of(source, len(example_inputs or "x"), names, complete=example_inputs is not None)
    with silence(), random_numbers_kept(source), autocast_left_out() as autocasts:
        if example_inputs is None:
            graph_module = _by_fx(another_copy(source), call, leaf_modules)
            if isinstance(graph_module, Failed):
                raise neither(graph_module, None) from graph_module.error
            return _entered(graph_module, "trace")
        behaviour = behaviour_of(another_copy(source), example_inputs, call)
        graph_module = _first_that_behaves(source, behaviour, leaf_modules)
        if not is_float32(original):
            _take_other_floats(graph_module, behaviour.runs[0].inputs)
    warn_of_autocast(original, autocasts)
    largest = graph_module.meta.get(LARGEST_BATCH)
    if largest is not None:
        warn_of_largest_batch(largest)
    return graph_module


def _first_that_behaves(source: nn.Module, behaviour: Behaviour, leaf_modules: Sequence[str]) -> GraphModule:
    """Return what torch.fx's tracer gives, or torch.export's where that is better: closed modules are open in it."""
    first = _checked(_by_fx(another_copy(source), behaviour.call, leaf_modules), behaviour)
    if isinstance(first, GraphModule) and not _hides_products(first, leaf_modules):
        return _entered(first, "trace", behaviour)
    second = _by_export(source, behaviour)
    if isinstance(second, GraphModule):
        return _entered(second, "trace_by_export", behaviour)
    if isinstance(first, GraphModule):  # what is closed in it is reported by annotate
        return _entered(first, "trace", behaviour)
    raise neither(second, first) from second.error


def _entered(graph_module: GraphModule, tracer: str, behaviour: Behaviour | None = None) -> GraphModule:
    if behaviour is not None:
        graph_module.meta |= {BEHAVIOUR: behaviour, FIXED_BATCH: behaviour.fixed_batch}
    enter(graph_module, Stage.TRACED, Rewrite(tracer, len(graph_module.graph.nodes)))
    return graph_module


def _take_other_floats(graph_module: GraphModule, example_inputs: Sequence[Tensor]) -> None:
    """Let a graph take its float inputs in any type, as its user has them for a model of half weights."""
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, x in zip(placeholders, example_inputs, strict=True):
        if x.is_floating_point():
            readers = list(node.users)
            with graph.inserting_after(placeholders[-1]):
                converted = graph.call_method("float", (node,))
            for reader in readers:
                reader.replace_input_with(node, converted)
    graph_module.recompile()
    record_shapes(graph_module, example_inputs)


def _checked(graph_module: GraphModule | Failed, behaviour: Behaviour) -> GraphModule | Failed:
    """Run a graph on the example, noting shapes, and compare what it computes with what the model computes."""
    if isinstance(graph_module, Failed):
        return graph_module
    try:
        record_shapes(graph_module, behaviour.runs[0].inputs)
    except PTQError as error:
        return failed(error.__cause__ or error, behaviour.model)
    difference = behaviour.difference(graph_module)
    return graph_module if difference is None else Failed.differing(behaviour.model, difference)


def _by_fx(root: nn.Module, call: ModelCall, leaf_modules: Sequence[str]) -> GraphModule | Failed:
    tracer = _ViTTracer(leaf_modules)
    name = type(root).__name__
    # torch.fx names the placeholders after the parameters of a method, which a lambda with that signature has; what
    # else it reads has a name that contains all of theirs, and is none of them
    model, called = ("_".join((word, *call.names)) for word in ("model", "call"))
    parameters = ", ".join(call.names)
    traced = eval(f"lambda {model}, {parameters}: {called}({model}, {parameters})", {called: call})
    root.__class__ = type(name, (type(root),), {TRACED: traced, "__module__": type(root).__module__})
    try:
        with untouched(root):
            graph = tracer.trace(root)
            name_inputs(graph, call.names)
            return traced_module(root, graph, name)
    except Exception as error:  # noqa: BLE001 - it is part of the sentence if the other tracer fails too
        return failed(error, root)


def _by_export(source: nn.Module, behaviour: Behaviour) -> GraphModule | Failed:
    """Try torch.export for any batch; then with sizes kept symbols; then for batches that take the same branches."""
    inputs, fixed = behaviour.runs[0].inputs, behaviour.fixed_batch is not None
    tries = ((None, False), (None, True), (torch.export.Dim.DYNAMIC, True))
    failures: list[Failed] = []
    for batch, symbols in tries[:1] if fixed else tries:
        root = another_copy(source)
        sizes = symbolic_sizes(root) if symbols else contextlib.nullcontext()
        with batch_limits(partial(place_of, model=root)) as limits, sizes, untouched(root):
            try:
                graph_module = trace_by_export(root, inputs, behaviour.call, batch=batch, fixed=fixed)
            except Exception as error:  # noqa: BLE001 - it is part of the sentence
                failures.append(failed(error, root, limits))
                if failures[-1].cause not in BATCHES:
                    break
                continue
        result = _checked(graph_module, behaviour)
        if isinstance(result, GraphModule):
            return result
        failures.append(result)
    # where sizes stay symbols, what is left to fail is the cause
    return next((f for f in failures[1:2] if f.cause in BATCHES), failures[0])


def _hides_products(graph_module: GraphModule, leaf_modules: Sequence[str]) -> bool:
    nodes = graph_module.graph.nodes
    return any(hides_products(graph_module, node) and str(node.target) not in leaf_modules for node in nodes)


class _ViTTracer(Tracer):
    """A tracer that knows timm's own registries of untraceable modules and functions."""

    traced_func_name = TRACED

    def __init__(self, leaf_modules: Sequence[str] = ()) -> None:
        super().__init__(autowrap_functions=tuple(timm.models.get_notrace_functions()), param_shapes_constant=True)
        self.record_stack_traces = True  # an error of the export names the line
        self._closed = tuple(timm.models.get_notrace_modules())
        self._leaf_paths = frozenset(leaf_modules)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._leaf_paths:
            return True
        if isinstance(m, TRACEABLE):
            return False
        if isinstance(m, self._closed):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, PARALLEL) and not _is_changed(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if m is self.root:  # what is traced calls it, to run its hooks
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


#: Modules of torch.nn that are only a way to run another one.
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
#: Where torch keeps what runs around a module's forward, and around every module's.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _is_changed(m: nn.Module) -> bool:
    """Return whether this instance computes something else than its class: then a node of its class would not."""
    own = any(getattr(m, hooks) for hooks in HOOKS)
    return own or any(getattr(global_hooks, f"_global{hooks}") for hooks in HOOKS) or "forward" in vars(m)


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
