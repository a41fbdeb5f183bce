"""What ONNX Runtime makes of a file: every product as integers or in float, and every dequantization that is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from ptq4vit_fx.export.integer_products import STEP, integer_products
from ptq4vit_fx.export.proof.runtime import optimized

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
    "MatMulNBits": None,
}
FLOAT_PRODUCTS = frozenset(
    ["MatMul", "Gemm", "Conv", "FusedMatMul", "FusedGemm", "FusedConv", "Attention", "MultiHeadAttention"]
)
#: Operators that hand codes on as they are: a code behind them is the same code.
MOVING = frozenset(
    ["Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Flatten", "Identity"]
)


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


def runtime_graph(model: onnx.ModelProto) -> RuntimeGraph:
    """Let ONNX Runtime optimize a model for this machine, with its own (dynamic) batch, and read the result back."""
    after = optimized(model)
    names = _fused_names(model)
    makers = {output: node for node in after.graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in after.graph.initializer}
    products = []
    for node in after.graph.node:
        if node.op_type in INTEGER_PRODUCTS:
            name = names.get(node.output[0], node.name)
            products.append(RuntimeProduct(name, True, node.op_type, _types(node, types), _why_integer(node)))
        elif node.op_type in FLOAT_PRODUCTS:
            kinds = _dequantized_types(node, makers, types)
            products.append(RuntimeProduct(node.name, False, node.op_type, kinds, _why_float(node, makers)))
    return RuntimeGraph(
        dict(Counter(node.op_type for node in model.graph.node)),
        dict(Counter(node.op_type for node in after.graph.node)),
        tuple(products),
        tuple(_leftovers(after, makers)),
    )


def _fused_names(model: onnx.ModelProto) -> dict[str, str]:
    """Return result -> product: a node fused of MatMulInteger and what is behind it has no name of the file's."""
    names = {product.scaled.output[0]: product.multiply.name for product in integer_products(model.graph.node)}
    adds = [node for node in model.graph.node if node.op_type == "Add" and node.input[0] in names]
    return names | {add.output[0]: names[add.input[0]] for add in adds}


def _types(node: onnx.NodeProto, types: dict[str, int]) -> str:
    positions = INTEGER_PRODUCTS[node.op_type]
    if positions is None or len(node.input) <= max(positions):
        return ""
    return " x ".join(_type_name(types.get(node.input[position])) for position in positions)


def _dequantized_types(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], types: dict[str, int]) -> str:
    """Return the types of the codes that a float product's operands were, "float" for an operand that was none."""
    found = []
    for name in node.input[:2]:
        maker = makers.get(name)
        is_code = maker is not None and maker.op_type == "DequantizeLinear" and len(maker.input) > 2
        found.append(_type_name(types.get(maker.input[2])) if maker is not None and is_code else "float")
    return " x ".join(found)


def _type_name(kind: int | None) -> str:
    return "?" if kind is None else str(TensorProto.DataType.Name(kind)).lower()


def _why_integer(node: onnx.NodeProto) -> str:
    if node.op_type == "MatMulIntegerToFloat":
        return "both operands are codes, the result is float"
    if node.op_type.startswith("QLinear") or node.op_type == "QGemm":
        return "both operands are codes, and so is the result"
    return "its operands are codes"


def _why_float(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> str:
    sources = [makers[name].op_type if name in makers else "a constant" for name in node.input[:2]]
    dequantized = sources.count("DequantizeLinear")
    if dequantized == 2:
        return f"no integer kernel for {node.op_type} of these types with float output: quantized, computed in float"
    if dequantized == 1:
        other = next(source for source in sources if source != "DequantizeLinear")
        return f"only one operand is codes for the runtime, the other comes from {other}"
    return f"not quantized: its operands come from {' and '.join(sources)}"


def _leftovers(model: onnx.ModelProto, makers: dict[str, onnx.NodeProto]) -> Iterable[Leftover]:
    outputs = {output.name for output in model.graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] != STEP:
            reasons = [_why_read(reader) for reader in readers.get(node.output[0], [])]
            if node.output[0] in outputs:
                reasons.append("is an output of the model")
            yield Leftover(node.name, _source(node.input[0], makers), "; ".join(reasons))


def _source(name: str, makers: dict[str, onnx.NodeProto]) -> str:
    while name in makers and makers[name].op_type in MOVING:
        name = makers[name].input[0]
    if name not in makers:
        return "a constant"
    return makers[name].name or makers[name].op_type


def _why_read(reader: onnx.NodeProto) -> str:
    name = reader.name or reader.op_type
    if reader.op_type == "QuantizeLinear":
        return f"is quantized again at once by {name}: the two steps cancel or could be one"
    if reader.op_type in FLOAT_PRODUCTS:
        return f"feeds {name}, a product that runs in float"
    return f"feeds {name}, which computes in float"
