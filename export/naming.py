"""Name every ONNX node after the module that it comes from, and every Q/DQ pair after its site."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.export.contract import rewrite
from ptq4vit_fx.export.nodes import PAIR, QUANTIZE, add_constant, input_of, maker, name_of, scope_of
from ptq4vit_fx.passes.graph.marks import NO_MODULE

SCOPES_KEY = "pkg.torch.onnx.name_scopes"


@rewrite(nothing="the graph has no nodes")
def name_nodes(model: ir.Model) -> int:
    """Rename the nodes to `<module path>/<operator>`, numbered where that repeats; drop the exporter's notes.

    The exporter records the module scopes of each node, the innermost last but one; passes of this package add the name
    of the product or site as the innermost scope.
    """
    graph, taken = model.graph, Counter[str]()
    for node in graph:
        scopes = node.metadata_props.get(SCOPES_KEY)
        path = _innermost(scopes) if scopes else ""
        base = names.node(path, node.op_type)
        node.name = names.node(path, node.op_type, taken[base])
        taken[base] += 1
        node.metadata_props.clear()
    outputs = [value for node in graph for value in node.outputs]
    for value in (*outputs, *graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
    graph.metadata_props.clear()
    return len(graph)


def _innermost(scopes: str) -> str:
    found = [name for name in ast.literal_eval(scopes)[:-1] if name and name != NO_MODULE]
    return str(found[-1]) if found else ""


@rewrite(nothing="no division by scales per head stands in front of a quantizer")
def own_head_scales(model: ir.Model) -> int:
    """Give every division by scales per head its own constant, named after its site: `<site, : as .>_head.scale`.

    The exporter merges equal constants under the name of the first, and a reader of the file looks for each site's.
    """
    count = 0
    for quantize in model.graph:
        divide = maker(quantize, 0, "Div") if quantize.op_type == QUANTIZE else None
        if divide is not None and names.is_head_scale(name_of(divide.inputs[1])):
            tensor = input_of(divide, 1).const_value
            assert tensor is not None
            own = add_constant(model, names.head_scale(scope_of(quantize)), tensor)
            divide.replace_input_with(1, own)
            count += 1
    return count


@rewrite(nothing="the graph has no quantizer")
def own_parameters(model: ir.Model) -> int:
    """Give every Q/DQ node its own scale and zero point, named after its site: `<node>.scale`, `<node>.zero_point`.

    The exporter merges equal constants. A reader of the file wants one per site, and ONNX Runtime's rewrite of int8
    weights for CPUs without VNNI (session.x64quantprecision) fails on a shared zero point.
    """
    pairs = [node for node in model.graph if node.op_type in PAIR]
    parameters: tuple[tuple[int, names.Role], ...] = ((1, "scale"), (2, "zero_point"))
    for node in pairs:
        for index, role in parameters:
            tensor = input_of(node, index).const_value
            assert tensor is not None
            own = add_constant(model, names.tensor(scope_of(node), role), tensor)
            node.replace_input_with(index, own)
    return len(pairs)
