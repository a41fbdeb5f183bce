"""What ONNX Runtime makes of a file: every product as integers or in float, and every dequantization that is left."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.errors import failure, some_names
from ptq4vit_fx.export.integer_products import STEP, integer_products
from ptq4vit_fx.export.nodes import DEQUANTIZE, MOVES, QUANTIZE, kind_of, maker, name_of, users
from ptq4vit_fx.export.proof.runtime import optimized
from ptq4vit_fx.export.traps import BLOCK_PRODUCT, BLOCKS, DYNAMIC, SATURATION, Trap, traps_in

#: Integer products of ONNX Runtime (contrib operators included), and where their zero points are among the inputs.
INTEGER_PRODUCTS: dict[str, tuple[int, int] | None] = {
    "MatMulIntegerToFloat": (4, 5),
    "MatMulInteger": (2, 3),
    "DynamicQuantizeMatMul": None,
    "QLinearMatMul": (2, 5),
    "QGemm": (2, 5),
    "QLinearConv": (2, 5),
    "ConvInteger": (2, 3),
    "QAttention": None,
}
FLOAT_PRODUCTS = frozenset(
    ["MatMul", "Gemm", "Conv", "FusedMatMul", "FusedGemm", "FusedConv", "Attention", "MultiHeadAttention"]
)
#: Operators that hand codes on as they are: a code behind them is the same code.
MOVING = MOVES | {"Expand"}


@dataclass(frozen=True)
class RuntimeProduct:
    """One product of the optimized graph: node name, operator, and why it runs as it does.

    types: of its operands, those of the codes if they are dequantized for a float product; "" if unknown.
    """

    name: str
    integer: bool
    operator: str
    types: str
    reason: str


@dataclass(frozen=True)
class Leftover:
    """A DequantizeLinear of codes in the optimized graph: its values are computed with in float.

    source: what made the codes: a QuantizeLinear (a pair that has no integer work between), another node, or a
    constant. reason: who reads the values.
    """

    name: str
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} (codes from {self.source}): {self.reason}"


@dataclass(frozen=True)
class RuntimeGraph:
    """What ONNX Runtime will run: operator counts of the file and of the optimized graph, products, leftovers."""

    before: dict[str, int]
    after: dict[str, int]
    products: tuple[RuntimeProduct, ...]
    leftovers: tuple[Leftover, ...]

    @property
    def integer_products(self) -> tuple[str, ...]:
        """Names of the nodes that multiply integers."""
        return tuple(product.name for product in self.products if product.integer)

    @property
    def float_products(self) -> dict[str, str]:
        """Name of each node that multiplies floats -> why."""
        return {product.name: product.reason for product in self.products if not product.integer}


def runtime_graph(model: ir.Model) -> RuntimeGraph:
    """Let ONNX Runtime optimize a model for this machine, with its own (dynamic) batch, and read the result back."""
    after = optimized(model)
    fused = _fused_names(model)
    products = []
    for node in after.graph:
        if node.op_type in INTEGER_PRODUCTS:
            name = fused.get(name_of(node.outputs[0]), name_of(node))
            products.append(RuntimeProduct(name, True, node.op_type, _types(node), _why_integer(node)))
        elif node.op_type == BLOCK_PRODUCT:
            products.append(_of_blocks(node))
        elif node.op_type in FLOAT_PRODUCTS:
            types = " x ".join(_dequantized_type(node, index) for index in (0, 1))
            products.append(RuntimeProduct(name_of(node), False, node.op_type, types, _why_float(node)))
    return RuntimeGraph(
        dict(Counter(node.op_type for node in model.graph)),
        dict(Counter(node.op_type for node in after.graph)),
        tuple(products),
        tuple(_leftovers(after)),
    )


def traps_met(model: ir.Model, graph: RuntimeGraph, *, saturates: bool) -> tuple[Trap, ...]:
    """Return the traps that a file falls into: of ONNX Runtime by the kernels that it takes here, else by the file.

    graph: `runtime_graph(model)`. saturates: whether the kernels of this CPU do (`products_saturate`).
    """
    here = {(product.operator, names.path_of(product.name)) for product in graph.products if product.integer}
    met = []
    for trap in traps_in(model):
        places = tuple(place for place in trap.places if not trap.kernel or (trap.kernel, place) in here)
        if places and (saturates or trap.name != SATURATION.name):
            met.append(replace(trap, places=places))
    return tuple(met)


def check_runs(operation: str, path: str | os.PathLike[str], traps: Iterable[Trap]) -> None:
    """Raise PTQError if one of the traps of a file is that ONNX Runtime opens it and cannot run it."""
    for trap in traps:
        if trap.name == BLOCKS.name:
            places = some_names(trap.places)
            raise failure(operation, f"{path}: {places}", expected="a file that runs", got=trap.result, do=trap.do)


def _of_blocks(node: ir.Node) -> RuntimeProduct:
    """Return a product of weights in blocks, which is one of integers where the runtime quantizes activations, too."""
    dynamic = node.attributes.get_int("accuracy_level", 0) == DYNAMIC
    bits = node.attributes.get_int("bits", 4)
    reason = "the runtime quantizes the activations itself while it runs" if dynamic else "computed in float"
    types = f"{'dynamic int8' if dynamic else 'float'} x {bits} bits"
    return RuntimeProduct(name_of(node), dynamic, node.op_type, types, f"only the weights are codes: {reason}")


def _fused_names(model: ir.Model) -> dict[str, str]:
    """Return result -> product: a node fused of MatMulInteger and what is behind it has no name of the file's."""
    fused = {}
    for product in integer_products(model):
        adds = [user for user in users(product.scaled) if user.op_type == "Add" and maker(user, 0) is product.scaled]
        for last in (product.scaled, *adds):
            fused[name_of(last.outputs[0])] = name_of(product.multiply)
    return fused


def _types(node: ir.Node) -> str:
    positions = INTEGER_PRODUCTS[node.op_type]
    if positions is None or len(node.inputs) <= max(positions):
        return ""
    return " x ".join(_type_name(node.inputs[position]) for position in positions)


def _dequantized_type(node: ir.Node, index: int) -> str:
    """Return the type of the codes that a float product's operand was, "float" if it was none."""
    source = maker(node, index, DEQUANTIZE)
    return _type_name(source.inputs[2]) if source is not None and len(source.inputs) > 2 else "float"


def _type_name(zero_point: ir.Value | None) -> str:
    kind = kind_of(zero_point)
    return "?" if kind is None else kind.name.lower()


def _why_integer(node: ir.Node) -> str:
    if node.op_type == "MatMulIntegerToFloat":
        return "both operands are codes, the result is float"
    if node.op_type.startswith("QLinear") or node.op_type == "QGemm":
        return "both operands are codes, and so is the result"
    return "its operands are codes"


def _why_float(node: ir.Node) -> str:
    makers = [maker(node, index) for index in range(len(node.inputs[:2]))]
    sources = ["a constant" if source is None else source.op_type for source in makers]
    dequantized = sources.count(DEQUANTIZE)
    if dequantized == 2:
        return f"no integer kernel for {node.op_type} of these types with float output: quantized, computed in float"
    if dequantized == 1:
        other = next(source for source in sources if source != DEQUANTIZE)
        return f"only one operand is codes for the runtime, the other comes from {other}"
    return f"not quantized: its operands come from {' and '.join(sources)}"


def _leftovers(model: ir.Model) -> Iterable[Leftover]:
    for node in model.graph:
        if node.op_type == DEQUANTIZE and name_of(node.inputs[0]) != STEP:
            reasons = [_why_read(use.node) for use in node.outputs[0].uses()]
            if node.outputs[0].is_graph_output():
                reasons.append("is an output of the model")
            yield Leftover(name_of(node), _source(node), "; ".join(reasons))


def _source(dequantize: ir.Node) -> str:
    source = maker(dequantize, 0)
    while source is not None and source.op_type in MOVING:
        source = maker(source, 0)
    return "a constant" if source is None else name_of(source)


def _why_read(reader: ir.Node) -> str:
    name = name_of(reader)
    if reader.op_type == QUANTIZE:
        return f"is quantized again at once by {name}: the two steps cancel or could be one"
    if reader.op_type in FLOAT_PRODUCTS:
        return f"feeds {name}, a product that runs in float"
    return f"feeds {name}, which computes in float"
