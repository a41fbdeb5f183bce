"""ONNX Runtime sessions, and whether its integer kernels are exact on this CPU."""

from __future__ import annotations

import functools
import math
import os

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from ptq4vit_fx.export.containers import to_unsigned, to_unsigned_weights
from ptq4vit_fx.export.integer_products import to_integer_products, to_qdq_products
from ptq4vit_fx.export.model_files import (
    is_too_large,
    load_file,
    message_of,
    save_with_data,
    tensors_of,
    unreadable,
)
from ptq4vit_fx.export.traps import ACCURACY_LEVEL, EXACT
from ptq4vit_fx.files import scratch
from ptq4vit_fx.inputs.sizes import COPIES, FLOAT_BYTES, check_memory


def open_session(path: str | os.PathLike[str], *, exact: bool = True, threads: int = 0) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime's CPU provider.

    exact: open what `exact_here` makes of it, and let no product quantize activations that are float in the file; with
    exact=False the file runs as it is, by the runtime's defaults. threads: 0 lets the runtime choose. Raises PTQError
    if the file cannot be read, if the runtime refuses it, and on a fixed batch that no memory holds: releases before
    1.32 may ask for it as they open the file.
    """
    model = load_file(path)
    _check_batch(model, path)
    with unreadable("open in ONNX Runtime", path, "a model that it opens"):
        return open_model(exact_here(model), options=exact_options(threads)) if exact else open_model(model, threads)


def _check_batch(model: ir.Model, path: str | os.PathLike[str]) -> None:
    fixed = [value.shape.numpy() for value in model.graph.inputs if value.shape is not None and value.shape.is_static()]
    size = COPIES * FLOAT_BYTES * sum(map(math.prod, fixed))
    what = f"the {fixed[0][0] if fixed and fixed[0] else 1} images that the file takes at once"
    check_memory("open in ONNX Runtime", str(path), size, what=what, do="export it with a smaller batch=")


def open_model(
    model: ir.Model, threads: int = 0, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """Open a model in memory, as it is, in ONNX Runtime's CPU provider.

    options: in the place of `quiet_options(threads)`. A model that is too large for a message goes through a temporary
    file.
    """
    options, providers = options or quiet_options(threads), ["CPUExecutionProvider"]
    if not is_too_large(model):
        return onnxruntime.InferenceSession(message_of(model).SerializeToString(), options, providers=providers)
    with scratch("open in ONNX Runtime", sum(tensor.nbytes for tensor in tensors_of(model))) as folder:
        path = folder / "model.onnx"
        save_with_data(model, path)
        return onnxruntime.InferenceSession(str(path), options, providers=providers)


def exact_here(model: ir.Model) -> ir.Model:
    """Return a model with the same values that no kernel of this CPU gets wrong.

    On a CPU whose u8 x s8 kernels saturate it is a copy whose int8 weights and activations are uint8, which takes the
    slower kernels that do not; elsewhere it is the model itself.
    """
    if not products_saturate():
        return model
    copy = model.clone()
    for step in (to_qdq_products, to_unsigned, to_unsigned_weights, to_integer_products):
        step(copy)
    return copy


def quiet_options(threads: int = 0) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what it raises says the same; its log shows names of the file as they are
    return options


def in_turn_options(threads: int = 0) -> onnxruntime.SessionOptions:
    """Return `quiet_options` of a session whose threads sleep while another one runs: else that has a core less."""
    options = quiet_options(threads)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def exact_options(threads: int = 0) -> onnxruntime.SessionOptions:
    """Return `quiet_options` with which products of weights in blocks compute in float."""
    options = quiet_options(threads)
    options.add_session_config_entry(ACCURACY_LEVEL, EXACT)
    return options


def optimized(model: ir.Model) -> ir.Model:
    """Return the graph that ONNX Runtime makes of a model on this machine, without its large weights."""
    with scratch("optimize in ONNX Runtime", sum(tensor.nbytes for tensor in tensors_of(model))) as folder:
        options = quiet_options()
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        if is_too_large(model):  # the optimized copy is too large as well
            key = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(key, "optimized.data")
        open_model(model, options=options)
        message = onnx.load(options.optimized_model_filepath, load_external_data=False)
    for node in message.graph.node:
        node.name = node.name or node.op_type  # a fused node may have none
    return ir.from_proto(message)


@functools.cache
def products_saturate() -> bool:
    """Return whether this CPU's u8 x s8 kernels saturate: multiply 255 by 127 in ONNX Runtime and look.

    x86 CPUs without VNNI add pairs of products in 16 bits (vpmaddubsw); 2 * 255 * 127 does not fit. See
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "reduce_range".
    """
    inner = 64
    x = ir.val("x", ir.DataType.UINT8, [16, inner])
    weight = ir.val("weight", const_value=ir.Tensor(np.full((inner, 32), 127, np.int8)))
    product = ir.node("MatMulInteger", [x, weight], outputs=[ir.val("y", ir.DataType.INT32, [16, 32])])
    graph = ir.Graph([x], product.outputs, nodes=[product], initializers=[weight], opset_imports={"": 13}, name="probe")
    (result,) = open_model(ir.Model(graph, ir_version=8)).run(None, {"x": np.full((16, inner), 255, np.uint8)})
    return bool((result != 255 * 127 * inner).any())
