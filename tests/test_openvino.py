"""The `openvino` target in OpenVINO's CPU plugin: integer products by its own runtime graph, and the same classes."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.models.vision_transformer import VisionTransformer
from trap_models import division_and_clip

import ptq4vit_fx as ptq
from ptq4vit_fx.export.division_bounds import bound_in_front_of_division
from ptq4vit_fx.export.model_files import load_file, message_of
from ptq4vit_fx.export.proof.openvino_runtime import compile_openvino, openvino_graph
from ptq4vit_fx.export.proof.runtime import open_session, products_saturate
from ptq4vit_fx.export.targets.openvino import check_openvino, separate_pairs

pytest.importorskip("openvino", reason="the extra `openvino` is not installed")


def tiny_vit(**kwargs):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5, **kwargs
    ).eval()


@pytest.fixture(scope="module")
def converted(small_images):
    """W7: without VNNI, OpenVINO's kernels saturate on 8-bit weights as ONNX Runtime's do (docs/targets.md)."""
    mapping = ptq.recipes.ptq4vit(7, 8)
    return ptq.quantize(tiny_vit(), small_images, qconfig_mapping=mapping, progress=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory, converted, small_images):
    path = tmp_path_factory.mktemp("openvino") / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1], target="openvino")
    return path


@pytest.fixture(scope="module")
def many_images():
    return torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def both(path, images):
    """Return the logits of ONNX Runtime with exact kernels and of OpenVINO."""
    mine = open_session(path, threads=1).run(None, {"image": images.numpy()})[0]
    return mine, compile_openvino(path)({"image": images.numpy()})[0]


def agreement(path, images):
    mine, theirs = both(path, images)
    return float((mine.argmax(1) == theirs.argmax(1)).mean()), float((np.abs(mine - theirs).max(1) < 1e-5).mean())


def test_every_product_runs_on_integers_and_classes_agree(file, many_images):
    graph = openvino_graph(file)
    products = [node.name for node in onnx.load(file).graph.node if node.op_type == "MatMul"]
    assert sorted(graph.integer_products) == sorted(products)
    assert len(products) == 10
    assert graph.float_products == {}
    assert all(" u8 " in kernel or " i8 " in kernel for kernel in graph.kernels.values())
    same_class, same_logits = agreement(file, many_images)
    assert same_class >= 0.99
    assert same_logits >= 0.9  # elsewhere its LayerNorm rounds a value to the other code


@pytest.mark.parametrize("twins", ["exact", "uniform"])
def test_grids_of_six_bits_agree_as_well(tmp_path, small_images, many_images, twins):
    mapping = ptq.recipes.ptq4vit(6, 6, twins=twins)  # uniform: with scales per head behind softmax
    converted = ptq.quantize(tiny_vit(), small_images, qconfig_mapping=mapping, progress=False)
    ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="openvino")
    _, same_logits = agreement(tmp_path / "model.onnx", many_images)
    assert same_logits >= 0.9


@pytest.mark.parametrize(("twins", "products"), [("uniform", 8), ("wide", 10)])
def test_codes_on_both_sides_of_zero_keep_their_zero_point_in_front_of_a_weight(
    tmp_path, small_images, many_images, twins, products
):
    mapping = ptq.recipes.ptq4vit(7, 8, twins=twins)
    if products_saturate():  # codes behind softmax are up to 255 here, and the other operand is an activation, too
        seven = ptq.recipes.ptq4vit(7, 7, twins=twins).global_qconfig
        mapping = mapping.set_module_name_regex(r".*matmul_av", seven)
    converted = ptq.quantize(tiny_vit(), small_images, qconfig_mapping=mapping, progress=False)
    path = tmp_path / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1], target="openvino")
    zero_points = {
        t.name: int(numpy_helper.to_array(t).max()) for t in onnx.load(path).graph.initializer if "_point" in t.name
    }
    kept = {name.rpartition(".")[0]: value for name, value in zero_points.items() if value}
    assert set(kept) == {"blocks.0.mlp.fc2:lhs" + ("_fine" if twins == "wide" else "")}
    graph = openvino_graph(path)
    assert len(graph.integer_products) == products
    assert graph.float_products == {}
    same_class, same_logits = agreement(path, many_images)
    assert same_class >= 0.99
    assert same_logits >= 0.9


def test_such_codes_are_refused_in_a_product_of_activations(tmp_path, small_images):
    class Products(torch.nn.Module):
        def forward(self, x):
            return torch.matmul(torch.nn.functional.gelu(x[:, 0]), x[:, 1]).flatten(1)

    mapping = ptq.recipes.ptq4vit(twins="uniform")
    converted = ptq.quantize(Products(), small_images, qconfig_mapping=mapping, progress=False)
    with pytest.raises(ptq.PTQError, match=r"matmul:lhs/QuantizeLinear.*in a product of two activations"):
        ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="openvino")
    assert not list(tmp_path.iterdir())


@pytest.mark.xfail(products_saturate(), strict=True, reason="this CPU has no VNNI: OpenVINO's kernels saturate")
def test_eight_bit_weights_are_exact_where_the_cpu_is(tmp_path, small_images, many_images):
    converted = ptq.quantize(tiny_vit(), small_images, progress=False)
    ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="openvino")
    same_class, same_logits = agreement(tmp_path / "model.onnx", many_images)
    assert not openvino_graph(tmp_path / "model.onnx").float_products
    assert same_class >= 0.99
    assert same_logits >= 0.9


def test_products_that_stay_float_are_named_with_the_reason(tmp_path, converted, small_images):
    path = tmp_path / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1])
    with pytest.raises(ptq.PTQError, match=r"got MatMulInteger in patch_embed.*; export with target='openvino'"):
        openvino_graph(path)
    ptq.export_onnx(converted, path, small_images[:1], target="generic")
    graph = openvino_graph(path)
    assert set(graph.float_products) == {"blocks.0.attn.matmul_qk/MatMul", "blocks.0.attn.matmul_av/MatMul"}
    assert "first operand has zero point 128" in graph.float_products["blocks.0.attn.matmul_qk/MatMul"]
    assert "8 integer products, 2 in float" in str(graph)
    mapping = ptq.recipes.ptq4vit().set_module_name("head", None)
    partly = ptq.quantize(tiny_vit(), small_images, qconfig_mapping=mapping, progress=False)
    ptq.export_onnx(partly, path, small_images[:1], target="openvino")
    (reason,) = openvino_graph(path).float_products.values()
    assert "not quantized" in reason


def test_every_pair_has_one_reader_and_no_zero_point(file):
    check_openvino(load_file(file))
    model = onnx.load(file)
    zero_points = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("zero_point")}
    assert not any(value.any() for value in zero_points.values())
    readers = [name for node in model.graph.node for name in node.input]
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(readers.count(node.output[0]) == 1 for node in pairs)
    twice = [node.name for node in pairs if node.name.startswith("blocks.0.attn.matmul_av:rhs/")]
    assert len(twice) == 4  # v is read by the two branches of the twin


def quantized_product(*, shared, zero_point=0):
    """Return x @ (w or x) on int8 codes, its DequantizeLinear shared or not."""
    value, constant = helper.make_tensor_value_info, numpy_helper.from_array
    readers = ["dq", "dq"] if shared else ["dq", "w"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="x:lhs/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], name="x:lhs/DequantizeLinear"),
        helper.make_node("MatMul", readers, ["y"], name="x/MatMul"),
    ]
    constants = [
        constant(np.float32(0.1), "s"),
        constant(np.int8(zero_point), "z"),
        constant(np.eye(4, dtype="f4"), "w"),
    ]
    shape = [value("x", TensorProto.FLOAT, [4, 4])], [value("y", TensorProto.FLOAT, [4, 4])]
    graph = helper.make_graph(nodes, "g", *shape, constants)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_shared_pairs_are_separated_and_others_left_alone():
    alone = quantized_product(shared=False)
    before = message_of(alone)
    done = separate_pairs(alone)
    assert (done.count, done.reason) == (0, "every DequantizeLinear has one reader and a QuantizeLinear of its own")
    assert message_of(alone) == before
    check_openvino(alone)
    shared = quantized_product(shared=True)
    with pytest.raises(ptq.PTQError, match=r"x:lhs/DequantizeLinear: expected one reader, got 2"):
        check_openvino(shared)
    assert separate_pairs(shared).count == 1
    check_openvino(shared)
    onnx.checker.check_model(message_of(shared), full_check=True)
    assert [node.op_type for node in shared.graph].count("QuantizeLinear") == 2


def test_two_dequantizations_of_one_quantizer_are_separated():
    model = quantized_product(shared=False)
    quantize, dequantize, product = model.graph
    again = ir.node("DequantizeLinear", dequantize.inputs, outputs=[ir.val("dq2")], name="y:rhs/DequantizeLinear")
    dequantize.append(again)
    product.replace_input_with(1, again.outputs[0])
    assert separate_pairs(model).count == 1
    check_openvino(model)
    onnx.checker.check_model(message_of(model), full_check=True)
    assert len(quantize.outputs[0].uses()) == 1


def test_a_zero_point_is_refused():
    with pytest.raises(ptq.PTQError, match="expected zero point 0, got 3"):
        check_openvino(quantized_product(shared=False, zero_point=3))


def test_unsigned_second_operands_are_announced(tmp_path, small_images):
    class Squared(torch.nn.Module):
        def forward(self, x):
            return torch.matmul(x[:, 0], torch.relu(x[:, 1])).mean((-1, -2), keepdim=False)[:, None] * torch.ones(5)

    converted = ptq.quantize(Squared(), small_images, progress=False)
    with pytest.warns(ptq.PTQWarning, match="matmul/MatMul will run in float in OpenVINO"):
        ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target="openvino")
    (reason,) = openvino_graph(tmp_path / "model.onnx").float_products.values()
    assert "OpenVINO chose MatMul f32" in reason


SCALES = np.array([0.001, 0.003], np.float32).reshape(-1, 1, 1)
VALUES = np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32) * 0.05


def computed(path, model):
    """Return what OpenVINO and ONNX Runtime compute from VALUES."""
    onnx.checker.check_model(message_of(model), full_check=True)
    onnx.save(message_of(model), path)
    (theirs,) = compile_openvino(path)({"x": VALUES}).values()
    (mine,) = open_session(path).run(None, {"x": VALUES})
    return theirs, mine


def test_bounds_in_front_of_the_division_are_computed_right(tmp_path):
    wanted = np.round(np.clip(VALUES / SCALES, -32, 31))
    _, plain = computed(tmp_path / "model.onnx", division_and_clip(SCALES))
    bounded = division_and_clip(SCALES)
    assert bound_in_front_of_division(bounded).count == 1
    theirs, mine = computed(tmp_path / "model.onnx", bounded)
    for found in (plain, mine, theirs):
        np.testing.assert_array_equal(found, wanted)
    one_scale = computed(tmp_path / "model.onnx", division_and_clip(np.float32(0.002)))  # right either way
    np.testing.assert_array_equal(*one_scale)


def test_other_clips_are_left_alone():
    model = division_and_clip(np.float32(0.002))
    model.graph[0].op_type = "Mul"
    before = message_of(model)
    assert bound_in_front_of_division(model).reason == "no Clip stands behind a division by constants"
    assert message_of(model) == before


def test_without_the_package_the_error_says_what_to_install(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ptq.PTQError, match=r"pip install 'ptq4vit-fx\[openvino\]'"):
        openvino_graph(file)


def test_a_file_that_openvino_refuses_is_named(tmp_path):
    (tmp_path / "no.onnx").write_text("nothing")
    with pytest.raises(ptq.PTQError, match=r"no\.onnx"):
        compile_openvino(tmp_path / "no.onnx")


@pytest.mark.sweep
@pytest.mark.fixtures
def test_a_trained_model_keeps_its_classes(tmp_path, trained):
    model, size = trained.load_model("deit_tiny_p8_64")
    mapping = ptq.recipes.ptq4vit(7, 8)
    converted = ptq.quantize(model, trained.load_images("calib", 32, size)[0], qconfig_mapping=mapping, progress=False)
    path = tmp_path / "model.onnx"
    ptq.export_onnx(converted, path, trained.load_images("calib", 1, size)[0], target="openvino")
    assert not openvino_graph(path).float_products
    same_class, _ = agreement(path, trained.load_images("val", 200, size)[0])
    assert same_class >= 0.95
