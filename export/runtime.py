"""ONNX Runtime sessions, and whether its integer kernels are exact on this CPU."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ptq4vit_fx.errors import failure


def load_file(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read an ONNX file; raises PTQError if it is missing or no ONNX file."""
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

    exact: open what `exact_here` makes of it; with exact=False the file runs as it is. threads: 0 lets the runtime
    choose. Raises PTQError if the file cannot be read.
    """
    model = load_file(path)
    return open_model(exact_here(model) if exact else model, threads)


def open_model(model: onnx.ModelProto, threads: int = 0) -> onnxruntime.InferenceSession:
    """Open a model in memory, as it is, in ONNX Runtime's CPU provider."""
    return onnxruntime.InferenceSession(
        model.SerializeToString(), quiet_options(threads), providers=["CPUExecutionProvider"]
    )


def exact_here(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the same values that no kernel of this CPU gets wrong.

    On a CPU whose u8 x s8 kernels saturate, constant int8 weights are rewritten to uint8, which takes the slower
    kernels that do not; elsewhere it is the model itself.
    """
    return with_unsigned_weights(model) if products_saturate() else model


def quiet_options(threads: int = 0) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


def optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime makes of a model on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        options = quiet_options()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


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


def with_unsigned_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose constant int8 weights are uint8 with the zero point raised by 128: the same values.

    u8 x u8 kernels are exact on every x86 CPU; those with VNNI run u8 x s8 faster.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    initializers = {initializer.name: initializer for initializer in copy.graph.initializer}
    shifted: set[str] = set()
    for node in copy.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in initializers:
            continue
        for name in (node.input[0], node.input[2]):
            tensor = initializers[name]
            if tensor.data_type == TensorProto.INT8 and name not in shifted:
                values = numpy_helper.to_array(tensor).astype(np.int16) + 128
                tensor.CopyFrom(numpy_helper.from_array(values.astype(np.uint8), name))
                shifted.add(name)
    kept = [value for value in copy.graph.value_info if value.name not in shifted]  # they still say int8
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(kept)
    return copy
