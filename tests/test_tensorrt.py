"""TensorRT's published rules: each fires on a file that breaks it alone, and a file that keeps them passes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from timm.models.vision_transformer import VisionTransformer

import ptq4vit_fx as ptq
from ptq4vit_fx.export.targets.lint_tensorrt import RULES, lint_tensorrt


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5).eval()


@pytest.fixture(scope="module")
def suitable(vit, small_images):
    return ptq.quantize(vit, small_images, qconfig_mapping=ptq.recipes.tensorrt(), progress=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory, suitable, small_images):
    path = tmp_path_factory.mktemp("tensorrt") / "model.onnx"
    ptq.export_onnx(suitable, path, small_images[:1], target="tensorrt")
    return path


def test_a_suitable_plan_passes_and_computes_what_was_simulated(file, suitable, small_images):
    model = onnx.load(file)
    assert lint_tensorrt(model) == []
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert tensors[node.input[2]].dtype == np.int8
            assert not tensors[node.input[2]].any()
    report = ptq.verify_onnx(file, suitable, small_images)
    assert report.same_functions.bit_equal == 1.0
    assert isinstance(suitable.plan.quantizers["blocks.0.mlp.fc2:lhs"], ptq.TwinUniform)


@pytest.mark.parametrize("mapping", [ptq.recipes.base_ptq(), ptq.recipes.tensorrt(4, 8)], ids=["base", "48"])
def test_other_suitable_plans(tmp_path, vit, small_images, mapping):
    converted = ptq.quantize(vit, small_images, qconfig_mapping=mapping, progress=False)
    ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="tensorrt")
    assert ptq.verify_onnx(tmp_path / "model.onnx", converted, small_images).same_functions.bit_equal == 1.0


def test_activations_of_fewer_bits_are_refused(tmp_path, vit, small_images):
    with pytest.raises(ptq.PTQError, match=r"recipes\.tensorrt: a_bits: expected 8, got 6"):
        ptq.recipes.tensorrt(6, 6)
    converted = ptq.quantize(vit, small_images, qconfig_mapping=ptq.recipes.base_ptq(6, 6), progress=False)
    with pytest.raises(ptq.PTQError, match=r"Softmax.*read by Clip.*activations to 8 bits"):
        ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="tensorrt")


def test_a_twin_behind_softmax_is_refused_in_one_sentence(tmp_path, vit, small_images):
    converted = ptq.quantize(vit, small_images, progress=False)
    with pytest.raises(ptq.PTQError) as caught:
        ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="tensorrt")
    message = str(caught.value)
    assert "node blocks.0.attn.matmul_av:lhs_fine/QuantizeLinear: expected what TensorRT holds (int8)" in message
    assert "violations" in message
    assert "recipes.tensorrt()" in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_unsigned_grids_of_eight_bits_are_refused_and_of_seven_fit(tmp_path, small_images):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5, act_layer=torch.nn.ReLU
    ).eval()
    converted = ptq.quantize(model, small_images, qconfig_mapping=ptq.recipes.tensorrt(), progress=False)
    with pytest.raises(ptq.PTQError, match=r"fc2:lhs.*UINT8.*activation=Uniform\(7\)"):
        ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="tensorrt")
    seven = ptq.QConfig(activation=ptq.Uniform(7), weight=ptq.Uniform(8, granularity="channel"))
    mapping = ptq.recipes.tensorrt().set_module_name("blocks.0.mlp.fc2", seven)
    converted = ptq.quantize(model, small_images, qconfig_mapping=mapping, progress=False)
    ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="tensorrt")
    assert ptq.verify_onnx(tmp_path / "model.onnx", converted, small_images).same_functions.bit_equal == 1.0


def find(model, name):
    return next(node for node in model.graph.node if node.name == name)


def constant(model, name, value):
    """Set a constant, or add it."""
    tensor = numpy_helper.from_array(np.asarray(value), name)
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    if name in known:
        known[name].CopyFrom(tensor)
    else:
        model.graph.initializer.append(tensor)


def unsigned(model):
    constant(model, "head:lhs.zero_point", np.uint8(0))


def zero_point(model):
    constant(model, "head:lhs.zero_point", np.int8(-128))


def without_zero_point(model):
    del find(model, "head:lhs/QuantizeLinear").input[2]


def scale_of_zero(model):
    constant(model, "head:rhs.scale", np.zeros(5, np.float32))


def two_scales(model):
    constant(model, "blocks.0.attn.matmul_qk:lhs.scale", np.ones(2, np.float32))


def wrong_axis(model):
    node = find(model, "blocks.0.attn.proj:rhs/DequantizeLinear")
    next(attribute for attribute in node.attribute if attribute.name == "axis").i = 0


def other_scale(model):
    constant(model, "another", np.float32(7))
    find(model, "head:lhs/DequantizeLinear").input[1] = "another"


def one_float_operand(model):
    find(model, "head/MatMul").input[0] = find(model, "head:lhs/QuantizeLinear").input[0]


def transpose_behind(model):
    product = find(model, "blocks.0.attn.matmul_qk/MatMul")
    between = helper.make_node("Transpose", [product.input[1]], ["t"], name="t", perm=[0, 1, 2, 3])
    model.graph.node.insert(list(model.graph.node).index(product), between)
    product.input[1] = "t"


def scale_behind(model):
    constant(model, "half", np.float32(0.5))
    softmax = find(model, "blocks.0.attn/Softmax")
    model.graph.node.append(helper.make_node("Mul", [softmax.input[0], "half"], ["scaled"], name="scaled"))
    softmax.input[0] = "scaled"


def second_reader_of_softmax(model):
    softmax = find(model, "blocks.0.attn/Softmax")
    model.graph.node.append(helper.make_node("Identity", [softmax.output[0]], ["seen"], name="seen"))


def scale_behind_second(model):
    product = find(model, "blocks.0.attn.matmul_av/MatMul")
    reader = next(node for node in model.graph.node if product.output[0] in node.input)
    constant(model, "half", np.float32(0.5))
    model.graph.node.append(helper.make_node("Mul", [product.output[0], "half"], ["scaled"], name="scaled"))
    reader.input[0] = "scaled"


@pytest.mark.parametrize(
    ("breaking", "rule", "node"),
    [
        (unsigned, "int8", "head:lhs/QuantizeLinear"),
        (zero_point, "zero point", "head:lhs/QuantizeLinear"),
        (without_zero_point, "zero point", "head:lhs/QuantizeLinear"),
        (scale_of_zero, "positive scale", "head:rhs/DequantizeLinear"),
        (two_scales, "per-tensor activations", "blocks.0.attn.matmul_qk:lhs/QuantizeLinear"),
        (wrong_axis, "output-channel axis", "blocks.0.attn.proj:rhs/DequantizeLinear"),
        (other_scale, "Q/DQ pair", "head:lhs/QuantizeLinear"),
        (one_float_operand, "both operands", "head/MatMul"),
        (transpose_behind, "DQ next to its product", "blocks.0.attn.matmul_qk:rhs/DequantizeLinear"),
        (scale_behind, "attention scale in front of Q", "scaled"),
        (second_reader_of_softmax, "one Q behind softmax", "blocks.0.attn/Softmax"),
        (scale_behind_second, "Q behind the second product", "blocks.0.attn.matmul_av/MatMul"),
    ],
)
def test_every_rule_fires_and_names_the_node(file, breaking, rule, node):
    model = onnx.load(file)
    breaking(model)
    found = [violation for violation in lint_tensorrt(model) if violation.rule == rule]
    assert node in [violation.node for violation in found]
    assert all(violation.do and violation.got for violation in found)


def test_the_table_above_has_every_rule():
    marks = test_every_rule_fires_and_names_the_node.pytestmark
    assert {case[1] for mark in marks for case in mark.args[1]} == set(RULES)


def add_mask(model):
    constant(model, "mask", np.zeros((1, 1, 17, 17), np.float32))
    softmax = find(model, "blocks.0.attn/Softmax")
    model.graph.node.append(helper.make_node("Add", [softmax.input[0], "mask"], ["masked"], name="masked"))
    softmax.input[0] = "masked"


def scalar_of_one_element(model):
    constant(model, "head:lhs.scale", np.full(1, 0.1, np.float32))
    constant(model, "head:lhs.zero_point", np.zeros(1, np.int8))


def one_scale_on_another_axis(model):
    wrong_axis(model)
    constant(model, "blocks.0.attn.proj:rhs.scale", np.float32(0.1))


def float_product(model):
    one_float_operand(model)
    constant(model, "weight", np.ones((32, 5), np.float32))
    find(model, "head/MatMul").input[1] = "weight"


@pytest.mark.parametrize("near", [add_mask, scalar_of_one_element, one_scale_on_another_axis, float_product])
def test_near_misses_pass(file, near):
    model = onnx.load(file)
    near(model)
    assert lint_tensorrt(model) == []


def test_float_attention_may_scale_where_it_wants(vit, tmp_path, small_images):
    mapping = ptq.recipes.ptq4vit().set_object_type(torch.matmul, None)
    converted = ptq.quantize(vit, small_images, qconfig_mapping=mapping, progress=False)
    assert [op.name for op in converted.plan.float_ops if op.asked] == [
        "blocks.0.attn.matmul_qk",
        "blocks.0.attn.matmul_av",
    ]
    ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="tensorrt")
