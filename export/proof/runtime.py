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
from ptq4vit_fx.export.containers import to_unsigned, with_unsigned_weights
from ptq4vit_fx.export.integer_products import with_integer_products, with_qdq_products
from ptq4vit_fx.export.model_files import is_too_large, session_of


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

    exact: open what `exact_here` makes of it; with exact=False the file runs as it is. threads: 0 lets the runtime
    choose. Raises PTQError if the file cannot be read.
    """
    model = load_file(path)
    return open_model(exact_here(model) if exact else model, threads)


def open_model(model: onnx.ModelProto, threads: int = 0) -> onnxruntime.InferenceSession:
    """Open a model in memory, as it is, in ONNX Runtime's CPU provider."""
    return session_of(model, quiet_options(threads))


def exact_here(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the same values that no kernel of this CPU gets wrong.

    On a CPU whose u8 x s8 kernels saturate, int8 weights and activations are rewritten to uint8, which takes the
    slower kernels that do not; elsewhere it is the model itself.
    """
    if not products_saturate():
        return model
    return with_integer_products(with_unsigned_weights(to_unsigned(with_qdq_products(model))))


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
        if is_too_large(model):  # the optimized copy is too large as well
            key = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(key, "optimized.data")
        session_of(model, options)
        return onnx.load(options.optimized_model_filepath, load_external_data=False)


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
    (result,) = open_model(model).run(None, {"x": np.full((16, inner), 255, np.uint8)})
    return bool((result != 255 * 127 * inner).any())
