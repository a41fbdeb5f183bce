"""Traps of runtimes: what a file says, and a runtime takes and then computes as something else, or not at all.

Each is a fact about the installed runtimes: tests/test_traps.py holds it, as a strict xfail where it is theirs to mend.
Sources: onnxruntime/core/optimizer/qdq_transformer/selectors_actions (DQMatMulToMatMulNBits, MatMulIntegerToFloat);
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "reduce_range"; OpenVINO: measured alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.errors import failure, some_names
from ptq4vit_fx.export.integer_products import in_qdq_form
from ptq4vit_fx.export.nodes import DEQUANTIZE, PRODUCTS, QUANTIZE, array, is_constant, kind_of, maker, name_of, users

ONNXRUNTIME, OPENVINO = "ONNX Runtime on CPUs", "OpenVINO"
#: The entry of a session's options that says how exact products of weights in blocks are; with EXACT they are float.
ACCURACY_LEVEL, EXACT = "session.qdq_matmulnbits_accuracy_level", "1"
#: The property of a compiled model in OpenVINO that says how many activations it quantizes together: none with 0.
GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
#: ONNX Runtime's product of weights in blocks of few bits; at DYNAMIC, its own choice, activations are quantized too.
BLOCK_PRODUCT, DYNAMIC = "MatMulNBits", 4
#: Two products of 255 and a weight up to this size fit into 16 bits: kernels that saturate are exact then.
SAFE_WEIGHT = 64
FEW_BITS = frozenset([ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4])
BYTES = frozenset([ir.DataType.INT8, ir.DataType.UINT8])
SIXTEEN_BITS = frozenset([ir.DataType.INT16, ir.DataType.UINT16])


@dataclass(frozen=True)
class Trap:
    """A trap that a file meets.

    name: of its rule. runtime: whose it is. places: the products or sites. result: what the runtime does there. do:
    what helps. kernel: the operator of ONNX Runtime's optimized graph by which it is seen, "" if none shows it.
    """

    name: str
    runtime: str
    places: tuple[str, ...]
    result: str
    do: str
    kernel: str = ""

    def __str__(self) -> str:
        return f"{self.runtime}: {some_names(self.places)}: {self.result}; {self.do}"


@dataclass(frozen=True)
class Rule:
    """A trap by itself: `places` yields the nodes of a graph in QDQ form that meet it."""

    name: str
    runtime: str
    result: str
    do: str
    places: Callable[[ir.Graph], Iterator[ir.Node]]
    kernel: str = ""


def _operands(product: ir.Node) -> tuple[ir.Node | None, ir.Node | None]:
    """Return the DequantizeLinear of both operands, None of an operand that is none."""
    return maker(product, 0, DEQUANTIZE), maker(product, 1, DEQUANTIZE)


def codes_kind(dequantize: ir.Node) -> ir.DataType | None:
    """Return the type of the codes: of the zero point or the constant, else of the tensor; None if nothing says it."""
    zero_point = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    codes = dequantize.inputs[0]
    return kind_of(zero_point) or kind_of(codes) or (None if codes is None else codes.dtype)


def _constant_right(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node | None, ir.Node]]:
    """Yield matrix products whose right operand is constant codes, with the DequantizeLinear of both."""
    for node in graph:
        if node.op_type not in PRODUCTS - {"Conv"} or node.attributes.get_int("transB", 0) == 1:
            continue
        left, right = _operands(node)
        if right is not None and is_constant(right.inputs[0]) and codes_kind(right) in FEW_BITS:
            yield node, left, right


def _sixteen_bits(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node, left, _ in _constant_right(graph) if left is not None and codes_kind(left) in SIXTEEN_BITS)


def _weights_alone(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node, left, _ in _constant_right(graph) if left is None)


def _bytes_alone(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node, left, right in _constant_right(graph) if left is None and codes_kind(right) in BYTES)


def _blocks(graph: ir.Graph) -> Iterator[ir.Node]:
    for node, left, right in _constant_right(graph):
        in_blocks = right.attributes.get_int("block_size", 0) > 0 and codes_kind(right) in BYTES
        if in_blocks and left is not None and codes_kind(left) in BYTES:
            yield node


def _saturating(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        left, right = _operands(node) if node.op_type in PRODUCTS else (None, None)
        if left is None or right is None or kind_of(right.inputs[0]) != ir.DataType.INT8:
            continue
        if codes_kind(left) in BYTES and (np.abs(array(right.inputs[0]).astype(np.int16)) > SAFE_WEIGHT).any():
            yield node


def _clip_behind_division(graph: ir.Graph) -> Iterator[ir.Node]:
    for clip in graph:
        divide = maker(clip, 0, "Div") if clip.op_type == "Clip" else None
        if divide is None or not is_constant(divide.inputs[1]) or array(divide.inputs[1]).size == 1:
            continue
        if any(user.op_type == QUANTIZE for user in users(clip)):
            yield clip


ANEW = f"quantizes its first operand to 8 bits itself while it runs ({BLOCK_PRODUCT}, accuracy level {DYNAMIC})"
SIXTEEN, ALONE, BLOCKS, SATURATION, DIVISION, ALONE_OPENVINO = (
    Rule(
        "16-bit activations",
        ONNXRUNTIME,
        f"16-bit activations are no more than 8-bit ones: it {ANEW}",
        f'set {ACCURACY_LEVEL} to "{EXACT}" in the session\'s options, or quantize activations to 8 bits',
        _sixteen_bits,
        BLOCK_PRODUCT,
    ),
    Rule(
        "weights alone",
        ONNXRUNTIME,
        f"only the weights are quantized in the file, and it {ANEW}",
        f'set {ACCURACY_LEVEL} to "{EXACT}" in the session\'s options to have float activations',
        _weights_alone,
        BLOCK_PRODUCT,
    ),
    Rule(
        "weights in blocks",
        ONNXRUNTIME,
        "8-bit activations and 8-bit weights with scales per block: it opens the file and fails when it runs",
        "give weights a scale per output channel",
        _blocks,
        "MatMulIntegerToFloat",
    ),
    Rule(
        "saturation",
        f"{ONNXRUNTIME} without VNNI",
        f"int8 weights beyond {SAFE_WEIGHT} can saturate",
        'for such CPUs export with target="onnxruntime-avx2" (uint8 weights), or quantize with w_bits=7',
        _saturating,
    ),
    Rule(
        "clip behind a division",
        OPENVINO,
        "it computes Div by several scales, Clip and QuantizeLinear wrongly",
        "export with target='openvino' or 'generic', which bound in front of the division",
        _clip_behind_division,
    ),
    Rule(
        "weights alone in OpenVINO",
        OPENVINO,
        "only the weights are quantized in the file, and it quantizes 32 neighbouring activations to 8 bits itself",
        f"set {GROUP_SIZE} to 0 to have float activations",
        _bytes_alone,
    ),
)
RULES = (SIXTEEN, ALONE, BLOCKS, SATURATION, DIVISION, ALONE_OPENVINO)


def traps_in(model: ir.Model, rules: tuple[Rule, ...] = RULES) -> tuple[Trap, ...]:
    """Return the traps that a file may meet, by what it says; a runtime that has mended one does not fall into it."""
    graph = in_qdq_form(model).graph
    found = {rule: dict.fromkeys(names.path_of(name_of(node)) for node in rule.places(graph)) for rule in rules}
    return tuple(
        Trap(rule.name, rule.runtime, tuple(places), rule.result, rule.do, rule.kernel)
        for rule, places in found.items()
        if places
    )


def check_traps(model: ir.Model, rules: tuple[Rule, ...]) -> None:
    """Raise PTQError if a file that is about to be written meets one of these traps, which are its runtime's."""
    for trap in traps_in(model, rules):
        expected, got = f"what {trap.runtime} computes as it is written", f"{trap.name}: {trap.result}"
        raise failure("export_onnx", some_names(trap.places), expected=expected, got=got, do=trap.do)
