"""Name every ONNX node after the module that it comes from, and every Q/DQ pair after its site."""

from __future__ import annotations

import ast

import onnx

from ptq4vit_fx.export.onnx_graph import drop_unused

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
#: How the name of a constant with scales per head ends.
HEAD_SCALE = "_head.scale"


def name_nodes(model: onnx.ModelProto) -> None:
    """Rename the nodes to `<module path>/<operator>`, numbered where that repeats; drop the exporter's notes.

    The exporter records the module scopes of each node, the innermost last but one; passes of this package add the name
    of the product or site as the innermost scope.
    """
    taken: dict[str, int] = {}
    for node in model.graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get(SCOPES_KEY)
        path = _innermost(scopes) if scopes else ""
        base = f"{path}/{node.op_type}" if path else node.op_type
        repeat = taken.get(base, 0)
        taken[base] = repeat + 1
        node.name = f"{base}_{repeat}" if repeat else base
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]


def _innermost(scopes: str) -> str:
    names = [name for name in ast.literal_eval(scopes)[:-1] if name and not name.startswith("_")]
    return str(names[-1]) if names else ""


def own_head_scales(model: onnx.ModelProto) -> None:
    """Give every division by scales per head its own constant, named after its site: `<site, : as .>_head.scale`.

    The exporter merges equal constants under the name of the first, and a reader of the file looks for each site's.
    """
    initializers = {initializer.name: initializer for initializer in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        divide = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if divide is None or divide.op_type != "Div" or not divide.input[1].endswith(HEAD_SCALE):
            continue
        name = f"{node.name.removesuffix('/QuantizeLinear').replace(':', '.')}{HEAD_SCALE}"
        if name not in initializers:
            initializers[name] = model.graph.initializer.add()
            initializers[name].CopyFrom(initializers[divide.input[1]])
            initializers[name].name = name
        divide.input[1] = name


def own_parameters(model: onnx.ModelProto) -> None:
    """Give every Q/DQ node its own scale and zero point, named after its site: `<node>.scale`, `<node>.zero_point`.

    The exporter merges equal constants. A reader of the file wants one per site, and ONNX Runtime's rewrite of int8
    weights for CPUs without VNNI (session.x64quantprecision) fails on a shared zero point.
    """
    initializers = {initializer.name: initializer for initializer in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        base = node.name.removesuffix(f"/{node.op_type}")
        for index, parameter in ((1, "scale"), (2, "zero_point")):
            name = f"{base}.{parameter}"
            if name not in initializers:
                copy = onnx.TensorProto()
                copy.CopyFrom(initializers[node.input[index]])
                copy.name = name
                initializers[name] = model.graph.initializer.add()
                initializers[name].CopyFrom(copy)
            node.input[index] = name
    drop_unused(model)
