"""What OpenVINO makes of a file: which products run on integers, by the precision in its runtime graph."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ptq4vit_fx import names
from ptq4vit_fx.errors import failure, foreign, reason_of
from ptq4vit_fx.export.model_files import data_files, load_file, unreadable
from ptq4vit_fx.export.nodes import DEQUANTIZE, PRODUCTS, Array, array, maker, name_of
from ptq4vit_fx.export.proof.running import Opened
from ptq4vit_fx.export.traps import GROUP_SIZE
from ptq4vit_fx.files import check_readable

#: Layer types of OpenVINO's runtime graph that multiply matrices, and the precisions that are integers.
PRODUCT_LAYERS = frozenset(["FullyConnected", "MatMul", "Convolution", "GroupConvolution", "MHA", "ScaledAttn"])
#: A kernel compiled for a whole group of operators, such as q @ k, softmax and softmax @ v (on CPUs with AVX-512).
COMPILED = "Subgraph"
INTEGERS = frozenset(["u8", "i8"])
#: What is float in a file is computed in float32.
FLOAT32: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", GROUP_SIZE: 0}


@dataclass(frozen=True)
class OpenvinoGraph:
    """Products by what OpenVINO computes them in.

    integer_products: names of the file's nodes. float_products: name -> why. kernels: name -> OpenVINO's layer type,
    precision and kernel, such as `FullyConnected i8 jit_gemm_i8`.
    """

    integer_products: tuple[str, ...]
    float_products: dict[str, str]
    kernels: dict[str, str]

    def __str__(self) -> str:
        lines = [f"OpenVINO: {len(self.integer_products)} integer products, {len(self.float_products)} in float"]
        return "\n".join([*lines, *(f"  float: {name}: {reason}" for name, reason in self.float_products.items())])


def openvino_graph(path: str | os.PathLike[str], device: str = "CPU") -> OpenvinoGraph:
    """Compile a file with OpenVINO and read back what every product runs in.

    device: one whose plugin publishes a runtime graph with precisions, as the CPU's does. Raises PTQError if OpenVINO
    is not installed, if the file cannot be read, if it is one for ONNX Runtime, or if a product of the file cannot be
    found in the runtime graph: nothing is left out unsaid.
    """
    graph = load_file(path).graph
    with unreadable("openvino_graph", path, "a file that export_onnx wrote"):
        return _read_back(graph, path, device)


def _read_back(graph: ir.Graph, path: str | os.PathLike[str], device: str) -> OpenvinoGraph:
    other = next((node.name for node in graph if node.op_type == "MatMulInteger"), None)
    if other is not None:
        expected, do = "products behind DequantizeLinear", "export with target='openvino'"
        raise failure("openvino_graph", str(path), expected=expected, got=f"MatMulInteger in {other}", do=do)
    inner = next((node.op_type for node in ir.traversal.RecursiveGraphIterator(graph) if node.graph is not graph), None)
    if inner is not None:  # OpenVINO takes twice as long for every If around an If
        expected, do = "a graph without graphs in its nodes", "pass a file that export_onnx wrote"
        raise failure("openvino_graph", str(path), expected=expected, got=f"{inner} inside of another node", do=do)
    products = {name_of(node): node for node in graph if node.op_type in PRODUCTS}
    layers = [_Layer.of(layer) for layer in compile_openvino(path, device).get_runtime_model().get_ops()]
    found = _match(list(products.values()), [layer for layer in layers if layer.kind in PRODUCT_LAYERS])
    found |= _compiled([name for name in products if name not in found], layers)
    kernels = {name: f"{layer.kind} {layer.precision} {layer.kernel}" for name, layer in found.items()}
    missing = [name for name in products if name not in kernels]
    if missing:
        raise failure(
            "openvino_graph",
            str(path),
            expected=f"{len(products)} products in OpenVINO's runtime graph",
            got=f"no layer for {', '.join(missing[:3])}",
            do="report this with your version of OpenVINO",
        )
    in_float = [name for name in products if found[name].precision not in INTEGERS]
    return OpenvinoGraph(
        tuple(name for name in products if found[name].precision in INTEGERS),
        {name: _why_float(products[name], kernels[name]) for name in in_float},
        kernels,
    )


def compile_openvino(path: str | os.PathLike[str], device: str = "CPU", threads: int = 0) -> Any:
    """Return OpenVINO's compiled model of a file; raises PTQError if OpenVINO is missing or refuses the file.

    threads: 0 lets it choose.
    What is not integer runs in float32, as in every other runtime: on CPUs with bf16 the plugin's default is bf16, for
    some quantized products as well.
    """
    try:
        import openvino
    except ImportError as error:
        raise failure(
            "openvino",
            "the Python package",
            expected="it to be installed",
            got=str(error),
            do="pip install 'ptq4vit-fx[openvino]'",
        ) from error
    check_readable(path, "openvino", "an ONNX model")
    with unreadable("openvino", path, "an ONNX model"):
        load_file(path).graph.sort()  # on a cycle OpenVINO 2025.1 does not end, and takes all memory
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    try:
        return openvino.Core().compile_model(os.fspath(path), device, FLOAT32 | settings)
    except Exception as error:
        weights = " and ".join(sorted(data.name for data in data_files(Path(path))))
        with_data = f" (its weights are in {weights})" if weights else ""
        raise failure(
            "openvino",
            f"{path}{with_data}",
            expected=f"a model that OpenVINO compiles for {device}",
            got=reason_of(error),
            do="check the path and the device",
        ) from error


@dataclass(frozen=True)
class _Layer:
    """A layer of OpenVINO's runtime graph. names: its own, those it was fused from, and its second operand's."""

    kind: str
    precision: str
    kernel: str
    names: tuple[str, ...]

    @staticmethod
    def of(node: Any) -> _Layer:
        facts = _facts(node)
        found = [node.get_friendly_name(), *facts.get("originalLayersNames", "").split(",")]
        if node.get_input_size() > 1:
            found.append(node.input_value(1).get_node().get_friendly_name())
        return _Layer(facts["layerType"], facts["runtimePrecision"], facts["primitiveType"], tuple(found))


def _facts(node: Any) -> dict[str, str]:
    return {key: value.astype(str) for key, value in node.get_rt_info().items() if hasattr(value, "astype")}


def _match(products: list[ir.Node], layers: list[_Layer]) -> dict[str, _Layer]:
    """Return the layer of each product of the file that can be found, by the product's name.

    Names that start with the product's, or are its output's, decide first. A fused layer may be named after
    another operator of the same module or site only, and those are given to the products that are left.
    """
    found: dict[str, _Layer] = {}
    for by_path in (False, True):
        for layer in layers:
            if layer in found.values():
                continue
            paths = {_module(name) for name in layer.names}
            for node in products:
                name = name_of(node)
                same = names.path_of(name) in paths if by_path else _is_named_after(node, layer)
                if same and name not in found:
                    found[name] = layer
                    break
    return found


def _compiled(missing: list[str], layers: list[_Layer]) -> dict[str, _Layer]:
    """Return, for products that are no layer of their own, the compiled group with an operator of the same module."""
    groups = [(layer, {_module(name) for name in layer.names}) for layer in layers if layer.kind == COMPILED]
    return {name: layer for layer, modules in groups for name in missing if _module(name) in modules}


def _module(name: str) -> str:
    return names.product_of(names.path_of(name))


def _is_named_after(node: ir.Node, layer: _Layer) -> bool:
    own, output = name_of(node), name_of(node.outputs[0])
    return any(name == output or names.is_derived(name, own) for name in layer.names)


def _why_float(product: ir.Node, kernel: str) -> str:
    for index, side in enumerate(("first", "second")):
        operand = maker(product, index)
        if operand is None or operand.op_type != DEQUANTIZE:
            return f"not quantized: its {side} operand comes from {operand.op_type if operand else 'a constant'}"
        zero_points = array(operand.inputs[2])
        if np.any(zero_points):
            return (
                f"its {side} operand has zero point {zero_points.reshape(-1)[0]}, and OpenVINO multiplies two "
                "activations as integers without zero points only: export with target='openvino'"
            )
    return f"OpenVINO chose {kernel}"


@contextmanager
def open_in_openvino(path: Path) -> Iterator[Opened]:
    """Yield a file as OpenVINO's CPU plugin runs it, float parts in float32; raises as `compile_openvino`."""
    compiled = compile_openvino(path)
    version = importlib.metadata.version("openvino")

    def run(arrays: Sequence[Array]) -> list[Array]:
        with foreign("openvino", str(path), expected="a file that it runs", do="export with target='openvino'"):
            results = compiled(list(arrays))
        return [np.array(results[port]) for port in compiled.outputs]

    yield Opened(f"OpenVINO {version}", run)
