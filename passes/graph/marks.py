"""What is known of a node beside its call: the product that it is, and the scope that it belongs to.

The scope of a node is the path of the module in whose forward it was traced; what passes insert for a product or for a
site has the name of that product or site (`ptq4vit_fx/names.py`) as its scope. ONNX nodes are named after it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import Graph, Node

from ptq4vit_fx.product_forms import PRODUCTS, ProductKind

_PRODUCT = "ptq4vit_op"
#: torch's own key: path -> (path, type), the innermost last.
SCOPES = "nn_module_stack"
#: What torch.export writes as the scope of nodes that it made itself: the one scope that is no path of the model.
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
#: Where a node that a pass inserted keeps the stack of the one that it stands for; torch's own is written to files.
LINE = "ptq4vit_stack_trace"


def stack_of(node: Node) -> str:
    """Return the lines of the forward that made a node, as a traceback, "" if the tracer did not note them."""
    return str(node.meta.get("stack_trace") or node.meta.get(LINE) or "")


def kind_of(node: Node) -> ProductKind | None:
    """Return the kind of a product in its canonical form, None if the node is none."""
    form = PRODUCTS.get(node.target) if node.op == "call_function" else None
    return form.kind if form and len(node.args) == len(form.parameters) and not node.kwargs else None


def planned_product(node: Node) -> str | None:
    """Return the name of the product of the plan that this node computes, or a part of."""
    return node.meta.get(_PRODUCT)


def planned_products(graph: Graph) -> Iterator[tuple[Node, str]]:
    """Yield the nodes that are products of the plan, with their names, in order; the graph may change meanwhile."""
    return ((node, name) for node in list(graph.nodes) if (name := planned_product(node)) is not None)


def mark_product(node: Node, name: str) -> None:
    """Let a node be a product of the plan."""
    node.meta[_PRODUCT] = name


def unmark_product(node: Node) -> None:
    """Let a node be no product of the plan any more."""
    del node.meta[_PRODUCT]


def scope_of(node: Node) -> str:
    """Return the innermost scope of a node ("" for the root)."""
    scopes = scopes_of(node)
    return scopes[-1] if scopes else ""


def scopes_of(node: Node) -> list[str]:
    """Return the scopes of a node, the innermost last."""
    return [path for path, _ in node.meta.get(SCOPES, {}).values() if path != NO_MODULE]


def put_in_scope(node: Node, like: Node, scope: str | None = None) -> Node:
    """Give a node the scopes and the line of `like`, and `scope` as the innermost one if given; return it."""
    node.meta[LINE] = stack_of(like)
    scopes = dict(like.meta.get(SCOPES, {}))
    if scope is not None:
        scopes.pop(scope, None)
        scopes[scope] = (scope, nn.Module)
    node.meta[SCOPES] = scopes
    return node
