"""The GraphModule that this package makes: copies and files of it keep the plan, the calibration and the stage.

torch.fx writes a GraphModule as Python code and traces that again when it is read: what is known of a node (the product
that it is, its shape, its scope) is lost. Here the nodes themselves are written.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import PythonCode
from torch.fx.node import map_aggregate

from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.graph.marks import SCOPES
from ptq4vit_fx.passes.graph.shapes import CALL, KNOWN, RESULT, call_of
from ptq4vit_fx.torch_state import AUTOCAST, without_autocast

if TYPE_CHECKING:
    from ptq4vit_fx.calibration import Calibration
    from ptq4vit_fx.plan import QuantPlan

#: What torch.fx makes anew of the graph.
MADE_ANEW = ("_graph", "_code", "_lineno_map", "_prologue_start", "_tracer_cls", "_tracer_extras")
#: Where a GraphModule keeps the names of attributes that copies must have.
PRESERVED = "_user_preserved_attributes"


@dataclass(frozen=True)
class Operator:
    """The name of an operator of torch.ops, `aten.add.Tensor`: operators themselves cannot be written."""

    name: str

    def target(self) -> Any:
        """Return the operator."""
        found: Any = torch.ops
        for part in self.name.split("."):
            found = getattr(found, part)
        return found


@dataclass(frozen=True)
class Reference:
    """A node, by its place in the graph."""

    place: int


@dataclass(frozen=True)
class StoredNode:
    """A node as it is written: its operands are References."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


class TracedModule(GraphModule):
    """A GraphModule that copy, pickle and torch.save keep whole, and that autocast does not round.

    plan: once it is prepared. calibration: once it is calibrated, None before.
    """

    plan: QuantPlan
    calibration: Calibration | None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not any(torch.is_autocast_enabled(kind) for kind in AUTOCAST):
            return super().__call__(*inputs, **named)
        with without_autocast():
            return super().__call__(*inputs, **named)

    def recompile(self) -> PythonCode:
        """Compile the graph, and leave out what torch.fx puts around its call: it prints half a graph on stderr."""
        code = super().recompile()
        if "__call__" in vars(type(self)):
            del type(self).__call__
        return code

    def __copy__(self) -> TracedModule:
        # A graph of its own: one of two modules belongs to neither.
        return _with_meta(TracedModule(self, copy.deepcopy(self.graph), class_name=type(self).__name__), self.meta)

    def __reduce__(self) -> Any:
        attributes = {name: value for name, value in self.__dict__.items() if name not in MADE_ANEW}
        attributes["meta"] = {key: value for key, value in self.meta.items() if key != KNOWN}
        return _restored, (type(self).__name__, attributes, _stored(self.graph))


def _restored(class_name: str, attributes: dict[str, Any], nodes: list[StoredNode]) -> TracedModule:
    """Return the module of what `__reduce__` wrote."""
    root, graph, made = nn.Module(), Graph(), list[Node]()
    root.__dict__.update(attributes)
    for stored in nodes:
        args, kwargs = map_aggregate((stored.args, stored.kwargs), lambda x: _node(x, made))
        target = stored.target.target() if isinstance(stored.target, Operator) else stored.target
        made.append(graph.create_node(stored.op, target, args, kwargs, stored.name))
        made[-1].meta = dict(stored.meta)
        if RESULT in stored.meta and stored.op not in ("placeholder", "get_attr", "output"):
            made[-1].meta[CALL] = call_of(made[-1])
    return _with_meta(TracedModule(root, graph, class_name=class_name), attributes["meta"])


def _with_meta(module: TracedModule, meta: dict[str, Any]) -> TracedModule:
    module.meta = {**meta, PRESERVED: dict(meta.get(PRESERVED, {}))}
    for name, value in module.meta[PRESERVED].items():
        setattr(module, name, value)
    return module


def _reference(x: Any, places: dict[Node, Reference]) -> Any:
    return places[x] if isinstance(x, Node) else x


def _node(x: Any, made: list[Node]) -> Any:
    return made[x.place] if isinstance(x, Reference) else x


def _stored(graph: Graph) -> list[StoredNode]:
    places = {node: Reference(place) for place, node in enumerate(graph.nodes)}
    return [_stored_node(node, places) for node in graph.nodes]


def _stored_node(node: Node, places: dict[Node, Reference]) -> StoredNode:
    target: Any = Operator(str(node.target)) if isinstance(node.target, OpOverload) else node.target
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda x: _reference(x, places))
    meta = {key: value for key, value in node.meta.items() if key != CALL}
    # The class of a module may not be found where the file is read.
    meta[SCOPES] = {key: (path, nn.Module) for key, (path, _) in node.meta.get(SCOPES, {}).items()}
    try:
        pickle.dumps((target, args, kwargs))
    except Exception as error:
        raise failure(
            "save",
            f"node {node.name}",
            expected="functions and arguments that pickle finds under their names",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            do="define that function at the top of a module; or save the calibration, and prepare the model anew",
        ) from error
    return StoredNode(node.op, node.name, target, args, kwargs, meta)
