"""ONNX Runtime sessions: what the runtime makes of a file, and whether its integer kernels are exact on this CPU."""

from __future__ import annotations

import functools
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.containers import to_unsigned, with_unsigned_weights
from ptq4vit_fx.export.model_files import is_too_large, session_of

#: Operators that multiply matrices, by the type that they compute in (ONNX Runtime's contrib operators included).
INTEGER_PRODUCTS = frozenset(
    [
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QLinearMatMul",
        "QGemm",
        "QLinearConv",
        "ConvInteger",
        "QAttention",
        "MatMulNBits",
    ]
)
FLOAT_PRODUCTS = frozenset(
    ["MatMul", "Gemm", "Conv", "FusedMatMul", "FusedGemm", "FusedConv", "Attention", "MultiHeadAttention"]
)


@dataclass(frozen=True)
class RuntimeGraph:
    """What ONNX Runtime will run: operator counts of the file and of the optimized graph, products by name.

    float_products: name of the node -> why it runs in float.
    """

    before: dict[str, int]
    after: dict[str, int]
    integer_products: tuple[str, ...]
    float_products: dict[str, str]


def load_file(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read an ONNX file, with the weights beside it if it has any; raises PTQError if one is missing or no ONNX."""
    try:
        return onnx.load(os.fspath(path))
    except Exception as error:
        raise failure(
            "read ONNX file",
            str(path),
            expected="an ONNX model",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            do="check the path",
        ) from error


def open_session(path: str | os.PathLike[str], *, exact: bool = True, threads: int = 0) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime's CPU provider.

    exact: on a CPU whose u8 x s8 kernels saturate, int8 weights and activations are rewritten to uint8 in memory, which
    takes the slower kernels that do not; elsewhere, and with exact=False, the file runs as it is.
    threads: 0 lets the runtime choose.
    """
    model = load_file(path)
    if exact and products_saturate():
        model = with_unsigned_weights(to_unsigned(model))
    return session_of(model, quiet_options(threads))


def quiet_options(threads: int = 0) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


def runtime_graph(path: str | os.PathLike[str]) -> RuntimeGraph:
    """Let ONNX Runtime optimize the file for this machine and read the result back."""
    model = load_file(path)
    with tempfile.TemporaryDirectory() as folder:
        options = quiet_options()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        if is_too_large(model):  # the optimized copy is too large as well
            key = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(key, "optimized.data")
        session_of(model, options)
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    makers = {output: node for node in optimized.graph.node for output in node.output}
    return RuntimeGraph(
        dict(Counter(node.op_type for node in model.graph.node)),
        dict(Counter(node.op_type for node in optimized.graph.node)),
        tuple(node.name for node in optimized.graph.node if node.op_type in INTEGER_PRODUCTS),
        {node.name: _why_float(node, makers) for node in optimized.graph.node if node.op_type in FLOAT_PRODUCTS},
    )


def _why_float(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> str:
    sources = [makers[name].op_type if name in makers else "a constant" for name in node.input[:2]]
    if all(source == "DequantizeLinear" for source in sources):
        return f"ONNX Runtime has no integer kernel for {node.op_type} with float output: quantized, computed in float"
    return f"not quantized: its operands come from {' and '.join(sources)}"


@functools.cache
def products_saturate() -> bool:
    """Return whether this CPU's u8 x s8 kernels saturate: multiply 255 by 127 in ONNX Runtime and look.

    x86 CPUs without VNNI add pairs of products in 16 bits (vpmaddubsw); 2 * 255 * 127 does not fit. See
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "reduce_range".
    """
    inner = 64
    weight = numpy_helper.from_array(np.full((inner, 32), 127, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [16, inner])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [16, 32])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), quiet_options(), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": np.full((16, inner), 255, np.uint8)})
    return bool((result != 255 * 127 * inner).any())
