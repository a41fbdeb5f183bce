"""Traps of the installed runtimes as facts, strict xfails where they are theirs to mend; and who names them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from trap_models import Product, division_and_clip, quantized_product, sixteen_by_eight

import ptq4vit_fx as ptq
from ptq4vit_fx.export.model_files import message_of
from ptq4vit_fx.export.proof.inspection import inspect_file
from ptq4vit_fx.export.proof.runtime import exact_options, open_model, products_saturate
from ptq4vit_fx.export.proof.runtime_graph import RuntimeProduct, runtime_graph, traps_met
from ptq4vit_fx.export.targets import TARGETS
from ptq4vit_fx.export.traps import (
    ALONE,
    ALONE_OPENVINO,
    BLOCKS,
    DIVISION,
    GROUP_SIZE,
    RULES,
    SATURATION,
    SIXTEEN,
    check_traps,
    traps_in,
)

PLAIN = (1e-6, "one float32 rounding per sum")


def run(product: Product, options=None) -> np.ndarray:
    return open_model(product.model, 1, options).run(None, {"x": product.values})[0]


def met(model: ir.Model) -> list[str]:
    return [trap.name for trap in traps_met(model, runtime_graph(model), saturates=False)]


def kernel(model: ir.Model) -> RuntimeProduct:
    (product,) = runtime_graph(model).products
    return product


@sixteen_by_eight
@pytest.mark.xfail(strict=True, reason="ONNX Runtime quantizes 16-bit activations to 8 bits again")
def test_16_bit_activations_are_computed_with_16_bits():
    product = quantized_product("int16", "int8")
    assert product.error(run(product)) < 1e-4


@sixteen_by_eight
def test_16_bit_activations_need_an_option_of_the_session():
    product = quantized_product("int16", "int8")
    assert 1e-3 < product.error(run(product)) < 0.05  # an error of 8 bits
    assert product.error(run(product, exact_options(1))) < 1e-6
    assert kernel(product.model).types == "dynamic int8 x 8 bits"
    assert met(product.model) == [SIXTEEN.name]


@pytest.mark.xfail(strict=True, reason="ONNX Runtime quantizes float activations where weights alone are quantized")
@pytest.mark.parametrize(("weight", "block"), [("int8", None), ("int4", 32)])
def test_weights_alone_leave_activations_float(weight, block):
    product = quantized_product(None, weight, block)
    assert product.error(run(product)) < 1e-4


@pytest.mark.parametrize(("weight", "block"), [("int8", None), ("int4", 32)])
def test_weights_alone_need_an_option_of_the_session(weight, block):
    product = quantized_product(None, weight, block)
    assert 1e-3 < product.error(run(product)) < 0.05
    assert product.error(run(product, exact_options(1))) < 1e-6
    assert kernel(product.model).integer
    assert "quantizes the activations itself" in kernel(product.model).reason
    assert met(product.model) == [ALONE.name, *([ALONE_OPENVINO.name] if weight == "int8" else [])]


@pytest.mark.xfail(strict=True, reason="ONNX Runtime fuses scales per block into a kernel that refuses them as it runs")
def test_8_bit_weights_in_blocks_run_beside_8_bit_activations():
    product = quantized_product("int8", "int8", 32)
    assert product.error(run(product)) < 1e-4


def test_8_bit_weights_in_blocks_are_named_before_they_fail():
    product = quantized_product("int8", "int8", 32)
    assert met(product.model) == [BLOCKS.name]
    assert kernel(product.model).operator == "MatMulIntegerToFloat"
    assert met(quantized_product("int8", "int4", 32).model) == []  # in float, exactly
    assert met(quantized_product("int8", "int8").model) == []


@pytest.mark.xfail(products_saturate(), strict=True, reason="this CPU has no VNNI: sums of two products saturate")
def test_u8_times_s8_is_exact():
    weight = np.full((64, 32), 127, np.int8)
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"], "fc/MatMulInteger")]
    ends = [helper.make_tensor_value_info("x", TensorProto.UINT8, [16, 64])]
    result = [helper.make_tensor_value_info("y", TensorProto.INT32, [16, 32])]
    graph = helper.make_graph(nodes, "g", ends, result, [numpy_helper.from_array(weight, "w")])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))
    (y,) = open_model(model, 1).run(None, {"x": np.full((16, 64), 255, np.uint8)})
    np.testing.assert_array_equal(y, 64 * 255 * 127)


def test_weights_that_can_saturate_are_named_where_the_cpu_does():
    model = quantized_product("int8", "int8").model
    graph = runtime_graph(model)
    assert [trap.name for trap in traps_met(model, graph, saturates=True)] == [SATURATION.name]
    small = quantized_product("int8", "int4").model  # codes up to 7
    assert not traps_met(small, runtime_graph(small), saturates=True)


SCALES = np.array([0.001, 0.003], np.float32).reshape(-1, 1, 1)
VALUES = np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32) * 0.05


@pytest.mark.xfail(
    strict=True, reason="OpenVINO clips wrongly behind a division by a tensor: once it does not, drop bounds"
)
def test_openvino_clips_after_a_division_by_a_tensor(tmp_path):
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    from ptq4vit_fx.export.proof.openvino_runtime import compile_openvino

    onnx.save(message_of(division_and_clip(SCALES)), tmp_path / "model.onnx")
    (theirs,) = compile_openvino(tmp_path / "model.onnx")({"x": VALUES}).values()
    np.testing.assert_array_equal(theirs, np.round(np.clip(VALUES / SCALES, -32, 31)))


@pytest.mark.xfail(strict=True, reason="OpenVINO quantizes float activations where weights alone are quantized")
def test_weights_alone_leave_activations_float_in_openvino(tmp_path):
    product, run_of = in_openvino(tmp_path, "int8")
    assert product.error(run_of(GROUP_SIZE_OF_ITS_OWN)) < 1e-4


def test_weights_of_four_bits_leave_them_float_in_openvino(tmp_path):
    product, run_of = in_openvino(tmp_path, "int4")
    assert product.error(run_of(GROUP_SIZE_OF_ITS_OWN)) < 1e-6


def test_weights_alone_need_a_property_of_openvino(tmp_path):
    product, run_of = in_openvino(tmp_path, "int8")
    assert 1e-3 < product.error(run_of(GROUP_SIZE_OF_ITS_OWN)) < 0.05
    assert product.error(run_of({})) < 1e-6


#: What OpenVINO takes by itself on CPUs.
GROUP_SIZE_OF_ITS_OWN = {GROUP_SIZE: 32}


def in_openvino(folder, weight):
    """Return a product whose weight alone is quantized, and a function that runs it with further properties."""
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    import openvino

    from ptq4vit_fx.export.proof.openvino_runtime import FLOAT32

    product = quantized_product(None, weight, None)
    onnx.save(message_of(product.model), folder / "model.onnx")

    def run_of(settings):
        compiled = openvino.Core().compile_model(folder / "model.onnx", "CPU", FLOAT32 | settings)
        return compiled({"x": product.values})[0]

    return product, run_of


def test_a_division_by_several_scales_is_named_and_refused():
    several, one = division_and_clip(SCALES), division_and_clip(np.float32(0.002))
    assert met(several) == [DIVISION.name]
    assert met(one) == []
    with pytest.raises(ptq.PTQError, match="expected what OpenVINO computes as it is written, got clip behind a div"):
        check_traps(several, (DIVISION,))
    check_traps(one, RULES)


@pytest.mark.parametrize(
    ("given", "rule"), [(("int16", "int8"), SIXTEEN), ((None, "int8"), ALONE), (("int8", "int8", 32), BLOCKS)]
)
def test_a_file_of_onnx_runtime_with_a_trap_is_not_written(given, rule):
    model = quantized_product(*given).model
    (trap,) = traps_in(model, (SIXTEEN, ALONE, BLOCKS))
    assert (trap.name, trap.places) == (rule.name, ("fc",))
    with pytest.raises(ptq.PTQError, match=r"^export_onnx: fc: expected what ONNX Runtime on CPUs computes"):
        check_traps(model, (SIXTEEN, ALONE, BLOCKS))
    with pytest.raises(ptq.PTQError):
        TARGETS["onnxruntime-arm"].check(model)


@pytest.fixture(scope="module")
def generic(tmp_path_factory, small_vit, small_images):
    """A plain QDQ file at opset 21 whose head is float, and the converted model."""
    mapping = ptq.recipes.ptq4vit().with_search(n=2, rounds=1)
    converted = ptq.quantize(small_vit, small_images, qconfig_mapping=mapping, skip=["head"], progress=False)
    path = tmp_path_factory.mktemp("traps") / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1], target="generic", opset=21)
    return path, converted


def changed(path, target, change) -> None:
    model = ir.load(path)
    change(model)
    ir.save(model, target)


def widen(model: ir.Model) -> None:
    """Give the codes of one activation 16 bits: the scale 2^-8 of itself, so that it is one of 16 bits in earnest."""
    for node in model.graph:
        if node.name.startswith("blocks.0.mlp.fc1:lhs/"):
            for value in node.inputs[1:]:
                wide = value.const_value.numpy()
                wide = wide / np.float32(256) if wide.dtype == np.float32 else np.array(32768, np.uint16)
                value.const_value = ir.Tensor(wide, name=value.name)
                value.type, value.shape = ir.TensorType(value.const_value.dtype), value.const_value.shape
        for output in node.outputs:
            output.type = None


def quantize_head(model: ir.Model) -> None:
    """Let the weights of the head, which the plan leaves float, be codes, as other programs do it."""
    product = next(node for node in model.graph if node.name.startswith("head/") and node.op_type in ("MatMul", "Gemm"))
    weight = product.inputs[1]
    values = weight.const_value.numpy()
    values = values.T.copy() if product.attributes.get_int("transB", 0) == 1 else values
    product.attributes.pop("transB", None)
    scale = np.float32(np.abs(values).max() / 127)
    constants = {"codes": np.rint(values / scale).astype(np.int8), "scale": scale, "zero": np.int8(0)}
    made = [ir.val(f"head.weight.{key}", const_value=ir.Tensor(np.asarray(v))) for key, v in constants.items()]
    model.graph.initializers.update({str(value.name): value for value in made})
    dequantize = ir.node("DequantizeLinear", made, outputs=[ir.val("head.weight.dq")], name="head.weight/Dequantize")
    product.prepend(dequantize)
    product.replace_input_with(1, dequantize.outputs[0])


@pytest.mark.parametrize(
    ("change", "rule", "place"),
    [
        pytest.param(widen, SIXTEEN, "blocks.0.mlp.fc1", marks=sixteen_by_eight),
        (quantize_head, ALONE, "head"),
    ],
)
def test_inspect_and_verify_name_what_a_file_meets(tmp_path, generic, small_images, change, rule, place):
    path, converted = generic
    assert not inspect_file(path).traps or products_saturate()
    changed(path, tmp_path / "trapped.onnx", change)
    others = (SATURATION.name, ALONE_OPENVINO.name)
    (trap,) = (trap for trap in inspect_file(tmp_path / "trapped.onnx").traps if trap.name not in others)
    assert (trap.name, trap.places) == (rule.name, (place,))
    assert "trap: ONNX Runtime on CPUs: " + place in str(inspect_file(tmp_path / "trapped.onnx"))
    report = ptq.verify_onnx(tmp_path / "trapped.onnx", converted, small_images, layers=0)
    assert rule.name in [trap.name for trap in report.traps]
    assert "session.qdq_matmulnbits_accuracy_level" in str(report)
    assert "a session with the runtime's defaults agrees on" in str(report)
    assert report.to_dict()["traps"][0]["places"] == (place,)
