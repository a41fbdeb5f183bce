"""Targets, opsets, and what a file is to the person who deploys it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from runtime_opsets import newest_in_runtime
from timm.models.vision_transformer import VisionTransformer

import ptq4vit_fx as ptq
from ptq4vit_fx.export import model_files
from ptq4vit_fx.export.containers import to_signed, to_unsigned
from ptq4vit_fx.export.contract import run_steps
from ptq4vit_fx.export.integer_products import in_qdq_form
from ptq4vit_fx.export.metadata import PROVENANCE_KEY, RECIPE_KEY
from ptq4vit_fx.export.model_files import load_file, message_of
from ptq4vit_fx.export.opsets import newest_opset, to_opset
from ptq4vit_fx.export.proof.inspection import inspect_file
from ptq4vit_fx.export.proof.runtime import open_session, quiet_options
from ptq4vit_fx.export.scales import read_scales
from ptq4vit_fx.export.targets import TARGETS
from ptq4vit_fx.export.targets.onnxruntime import check_arm, check_avx2, check_x86

AS_WRITTEN = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
ACTIVATIONS = {"onnxruntime": "UINT8", "onnxruntime-avx2": "UINT8", "onnxruntime-arm": "INT8", "generic": "UINT8"}
NEWEST_IN_RUNTIME = newest_in_runtime()
#: Opset -> the IR version that came with it (https://github.com/onnx/onnx/blob/main/docs/Versioning.md#released-versions).
FILE_FORMATS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}


def tiny_vit(act_layer=torch.nn.GELU):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5, act_layer=act_layer
    ).eval()


@pytest.fixture(scope="module")
def converted(small_images):
    return ptq.quantize(tiny_vit(), small_images, progress=False)


@pytest.fixture(scope="module")
def four_bits(small_images):
    return ptq.quantize(tiny_vit(), small_images, qconfig_mapping=ptq.recipes.ptq4vit(4, 6), progress=False)


@pytest.fixture(scope="module")
def default_file(tmp_path_factory, converted, small_images):
    path = tmp_path_factory.mktemp("default") / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1])
    return path


def run_as_written(path, images):
    """Return the logits of every Q, DQ and float MatMul as the file has them: no fusion."""
    options = quiet_options(1)
    options.graph_optimization_level = AS_WRITTEN
    model = message_of(in_qdq_form(load_file(path))).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def run_exact(path, images):
    session = open_session(path, threads=1)
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def zero_points(model):
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return {node.name.rsplit("/", 1)[0]: tensors[node.input[2]] for node in nodes}


def names_of(model):
    return {TensorProto.DataType.Name(tensor.data_type) for tensor in zero_points(model).values()}


@pytest.fixture(scope="module")
def four_bits_file(tmp_path_factory, four_bits, small_images):
    path = tmp_path_factory.mktemp("four_bits") / "model.onnx"
    ptq.export_onnx(four_bits, path, small_images[:1])
    return path


@pytest.mark.parametrize(
    ("target", "model"),
    [
        ("onnxruntime-avx2", "converted"),
        ("onnxruntime-arm", "converted"),
        ("onnxruntime-arm", "four_bits"),
        ("openvino", "converted"),
        ("openvino", "four_bits"),
        ("generic", "converted"),
    ],
)
def test_a_target_changes_no_value(tmp_path, request, small_images, target, model):
    default = request.getfixturevalue("default_file" if model == "converted" else "four_bits_file")
    path = tmp_path / "model.onnx"
    ptq.export_onnx(request.getfixturevalue(model), path, small_images[:1], target=target)
    assert np.array_equal(run_as_written(path, small_images), run_as_written(default, small_images))
    assert np.array_equal(run_exact(path, small_images), run_exact(default, small_images))
    if target in ACTIVATIONS:
        assert names_of(onnx.load(path)) == {ACTIVATIONS[target]}


def test_arm_is_symmetric_where_the_grid_is(default_file):
    model = load_file(default_file)
    assert to_signed(model).count
    values = {
        site: int(np.unique(numpy_helper.to_array(tensor)).item())
        for site, tensor in zero_points(message_of(model)).items()
    }
    assert values["blocks.0.attn.qkv:lhs"] == values["blocks.0.attn.matmul_qk:rhs"] == 0
    assert values["blocks.0.mlp.fc2:lhs_coarse"] == values["blocks.0.attn.matmul_av:lhs_coarse"] == -128
    assert values["blocks.0.mlp.fc2:lhs_fine"] == 127
    assert to_unsigned(model).count
    assert zero_points(message_of(model)) == zero_points(onnx.load(default_file))


def divisions_by_head(path):
    """Count what is divided by scales per head in front of a quantizer, and what the quantizer divides itself."""
    nodes = onnx.load(path).graph.node
    readers = [(node.op_type, node.input[1]) for node in nodes if node.op_type in ("Div", "QuantizeLinear")]
    found = [operator for operator, name in readers if name.endswith("_head.scale")]
    return found.count("Div"), found.count("QuantizeLinear")


def test_scales_per_head_are_divided_by_the_quantizer_unless_it_needs_a_clip(tmp_path, default_file, small_images):
    assert divisions_by_head(default_file) == (0, 0)  # q, k and v: in the projection; softmax has a twin
    path = tmp_path / "model.onnx"
    for bits, target, expected in ((8, "onnxruntime", (0, 1)), (8, "generic", (1, 0)), (6, "onnxruntime", (1, 0))):
        mapping = ptq.recipes.ptq4vit(bits, bits, twins="uniform")
        other = ptq.quantize(tiny_vit(), small_images, qconfig_mapping=mapping, progress=False)
        ptq.export_onnx(other, path, small_images[:1], target=target)
        assert divisions_by_head(path) == expected  # behind softmax; 6-bit activations are clipped between the two


@pytest.mark.parametrize(
    ("check", "wants"), [(check_x86, "onnxruntime"), (check_avx2, "onnxruntime-avx2"), (check_arm, "onnxruntime-arm")]
)
def test_integer_types_are_checked(default_file, converted, check, wants):
    model = in_qdq_form(load_file(default_file))
    for name in ("onnxruntime", "onnxruntime-avx2", "onnxruntime-arm"):
        written = model.clone()
        run_steps(written, TARGETS[name].steps, plan=converted.plan)
        if name == wants:
            check(written)
        else:
            with pytest.raises(ptq.PTQError, match=r"node .*Linear: expected U?INT8 codes"):
                check(written)


def test_operators_and_zero_points_are_checked(default_file):
    model = load_file(default_file)
    next(node for node in model.graph if node.op_type == "QuantizeLinear").resize_inputs(2)
    with pytest.raises(ptq.PTQError, match="expected a zero point, got none"):
        TARGETS["generic"].check(model)
    model = load_file(default_file)
    model.graph[0].domain = "com.microsoft"
    with pytest.raises(ptq.PTQError, match=r"com\.microsoft::"):
        TARGETS["generic"].check(model)


@pytest.fixture(scope="module")
def reference_18(tmp_path_factory, converted, small_images):
    path = tmp_path_factory.mktemp("opset") / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1], target="generic", opset=18)
    return run_as_written(path, small_images), run_exact(path, small_images)


#: Opsets that are made in another way than the one before: rules of this package, the exporter, the version converter.
KINDS_OF_OPSET = (17, 18, 20, 23, 24, NEWEST_IN_RUNTIME)


@pytest.mark.parametrize(
    "opset",
    [
        pytest.param(opset, marks=() if opset in KINDS_OF_OPSET else pytest.mark.sweep)
        for opset in range(17, newest_opset() + 1)
    ],
)
def test_every_opset_computes_the_same_to_the_last_bit(tmp_path, converted, small_images, reference_18, opset):
    path = tmp_path / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1], target="generic", opset=opset)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version == FILE_FORMATS.get(opset, model.ir_version)
    assert any(node.op_type == "Gelu" for node in model.graph.node) == (opset >= 20)
    if opset > NEWEST_IN_RUNTIME:  # the same nodes under the newest name that the runtime knows
        model.opset_import[0].version = NEWEST_IN_RUNTIME
        onnx.save(model, path)
    assert np.array_equal(run_as_written(path, small_images), reference_18[0])
    assert np.array_equal(run_exact(path, small_images), reference_18[1])


def reducing(opset_attributes=None, operator="ReduceMean", inputs=("x", "axes")):
    node = onnx.helper.make_node(operator, list(inputs), ["y"], name="n", **(opset_attributes or {}))
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", TensorProto.FLOAT, [2, 4, 4])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([1]), "axes")] if "axes" in inputs else [],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def test_axes_become_an_attribute_in_opset_17():
    x = np.random.default_rng(0).standard_normal((2, 4, 4)).astype(np.float32)
    for attributes in ({"keepdims": 0}, {"keepdims": 1, "noop_with_empty_axes": 1}):
        (wanted,) = ReferenceEvaluator(reducing(attributes)).run(None, {"x": x})
        model = ir.from_proto(reducing(attributes))
        assert to_opset(model, 17).count == 1
        (got,) = ReferenceEvaluator(message_of(model)).run(None, {"x": x})
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize(
    "model", [reducing({"noop_with_empty_axes": 1}, inputs=("x",)), reducing(operator="Mish", inputs=("x",))]
)
def test_what_opset_17_lacks_is_refused_by_name(model):
    with pytest.raises(ptq.PTQError, match="node n: expected an operator that opset 17 has"):
        to_opset(ir.from_proto(model), 17)


def test_four_bit_weights_take_four_bits_from_opset_21(tmp_path, four_bits, small_images):
    paths = {opset: tmp_path / f"{opset}.onnx" for opset in (20, 21)}
    sizes = {}
    for opset, path in paths.items():
        report = ptq.export_onnx(four_bits, path, small_images[:1], target="generic", opset=opset)
        assert report.bytes == path.stat().st_size
        tensors = [t for t in onnx.load(path).graph.initializer if t.name.endswith("codes")]
        assert {t.data_type for t in tensors} == {TensorProto.INT8 if opset == 20 else TensorProto.INT4}
        sizes[opset] = sum(len(t.raw_data) for t in tensors)
    assert sizes[21] * 2 == sizes[20]
    assert np.array_equal(run_as_written(paths[21], small_images), run_as_written(paths[20], small_images))


def test_other_weights_and_targets_keep_their_bytes(tmp_path, converted, four_bits, small_images):
    for model, target in ((converted, "generic"), (four_bits, "onnxruntime")):
        ptq.export_onnx(model, tmp_path / "m.onnx", small_images[:1], target=target, opset=21)
        tensors = onnx.load(tmp_path / "m.onnx").graph.initializer
        assert TensorProto.INT4 not in {tensor.data_type for tensor in tensors}


def test_a_fixed_batch_and_chosen_names(tmp_path, converted, small_images):
    path = tmp_path / "model.onnx"
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["scores"]}
    ptq.export_onnx(converted, path, small_images[:1], batch=4, **names)
    model = onnx.load(path)
    shapes = [v.type.tensor_type.shape.dim for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)]
    assert not any(dim.dim_param for dims in shapes for dim in dims)
    assert [dim.dim_value for dim in shapes[0]] == [4, 3, 16, 16]
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("pixels", "scores")
    report = ptq.verify_onnx(path, converted, list(small_images.split(4)))
    assert report.same_functions.bit_equal == 1.0
    assert not report.graph.float_products  # known shapes tempt the runtime to make Gemm of them
    assert ptq.verify_onnx(path, converted, small_images[:3]).same_functions.bit_equal == 1.0  # the rest is filled up


def test_arguments_are_checked_before_anything_is_written(tmp_path, converted, small_images):
    path = tmp_path / "model.onnx"
    for arguments, message in (
        ({"target": "tensort"}, "did you mean tensorrt"),
        ({"opset": 16}, "expected 17 to"),
        ({"opset": newest_opset() + 1}, "expected 17 to"),
        ({"batch": 0}, "batch: expected 1 or more"),
        ({"input_names": ["a", "b"]}, "expected one name, as image"),
        ({"input_names": ["x"], "output_names": ["x"]}, "expected names that differ"),
    ):
        with pytest.raises(ptq.PTQError, match=message):
            ptq.export_onnx(converted, path, small_images[:1], **arguments)
    assert not list(tmp_path.iterdir())


def test_a_large_model_keeps_its_weights_beside_the_file(tmp_path, monkeypatch, converted, default_file, small_images):
    monkeypatch.setattr(model_files, "PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr(model_files, "INLINE_BYTES", 256)
    path = tmp_path / "model.onnx"
    report = ptq.export_onnx(converted, path, small_images[:1])
    (data,) = model_files.data_files(path)
    assert set(tmp_path.iterdir()) == {path, data}
    assert report.bytes == sum(entry.stat().st_size for entry in tmp_path.iterdir())
    assert np.array_equal(run_as_written(path, small_images), run_as_written(default_file, small_images))
    assert np.array_equal(run_exact(path, small_images), run_exact(default_file, small_images))
    verified = ptq.verify_onnx(path, converted, small_images)
    assert verified.same_functions.bit_equal == 1.0
    assert not verified.graph.float_products
    assert "twin8/softmax" in str(inspect_file(path))
    assert set(read_scales(path)) == set(converted.plan.quantizers)
    assert set(tmp_path.iterdir()) == {path, data}
    data.unlink()
    with pytest.raises(ptq.PTQError, match="read ONNX file"):
        open_session(path)


def test_a_model_that_is_written_over_never_meets_the_weights_of_another(
    tmp_path, monkeypatch, converted, small_images
):
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(model_files, "INLINE_BYTES", 256)
    with monkeypatch.context() as patch:
        patch.setattr(model_files, "PROTOBUF_LIMIT", 1000)
        ptq.export_onnx(converted, path, small_images[:1])
        (first,) = model_files.data_files(path)
        before = run_as_written(path, small_images)

        other = tiny_vit()
        with torch.no_grad():
            other.blocks[0].mlp.fc1.weight.mul_(-1)
        other_converted = ptq.quantize(other, small_images, progress=False)
        replaced: list[str] = []
        replace = os.replace

        def interrupted(source, target):
            replaced.append(str(target))
            if len(replaced) == 2:
                raise KeyboardInterrupt
            replace(source, target)

        with patch.context() as inner:
            inner.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ptq.export_onnx(other_converted, path, small_images[:1])
        assert replaced[1] == str(path)
        assert np.array_equal(run_as_written(path, small_images), before)

        ptq.export_onnx(other_converted, path, small_images[:1])
        (second,) = model_files.data_files(path)
        assert second != first
        assert not np.array_equal(run_as_written(path, small_images), before)
    ptq.export_onnx(converted, path, small_images[:1])  # fits into one file
    assert set(tmp_path.iterdir()) == {path}
    assert np.array_equal(run_as_written(path, small_images), before)


@pytest.mark.parametrize("limit", [1000, model_files.PROTOBUF_LIMIT])
def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch, converted, small_images, limit):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(model_files, "PROTOBUF_LIMIT", limit)
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(ptq.PTQError, match="disk full"):
        ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1])
    assert not list(tmp_path.iterdir())


def test_the_file_says_how_it_was_made(default_file, converted):
    properties = {entry.key: entry.value for entry in onnx.load(default_file).metadata_props}
    record = json.loads(properties[RECIPE_KEY])
    assert record["recipe"] == "best(8, 8, weights='channel', twins='exact')"
    (search,) = record["searches"]
    assert search["settings"]["metric"] == "hessian"
    assert search["products"] == [op.name for op in converted.plan.ops]
    assert json.loads(properties[PROVENANCE_KEY])["loss"] == "projection"
    assert ptq.QuantPlan.from_json(converted.plan.to_json()).recipe == record["recipe"]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_every_scale_is_read_back_bit_for_bit(tmp_path, converted, small_images, target):
    path = tmp_path / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1], target=target)
    scales = read_scales(path)
    assert set(scales) == set(converted.calibration.params)
    for site, params in converted.calibration.params.items():
        if isinstance(converted.plan.quantizers[site], ptq.TwinUniform):
            assert np.array_equal(scales[site].scale, params.fine_scale.numpy())
            coarse = scales[site].coarse_scale
            assert coarse is not None
            assert np.array_equal(coarse, params.coarse_scale.numpy())
        else:
            assert np.array_equal(scales[site].scale, params.scale.numpy()), site


def test_equal_scales_of_heads_are_read_back_at_every_site(tmp_path, converted, small_images):
    prepared = ptq.prepare_fx(tiny_vit(), ptq.recipes.best(), small_images[:1])
    params = dict(converted.calibration.params)
    params["blocks.0.attn.matmul_qk:rhs"] = params["blocks.0.attn.matmul_qk:lhs"]
    ptq.load_calibration(prepared, replace(converted.calibration, params=params))
    ptq.export_onnx(ptq.convert_fx(prepared), tmp_path / "model.onnx", small_images[:1])
    scales = read_scales(tmp_path / "model.onnx")
    assert np.array_equal(scales["blocks.0.attn.matmul_qk:rhs"].scale, scales["blocks.0.attn.matmul_qk:lhs"].scale)


def test_a_foreign_file_has_no_scales_to_read(tmp_path):
    onnx.save(reducing(), tmp_path / "other.onnx")
    with pytest.raises(ptq.PTQError, match="expected a quantization plan"):
        read_scales(tmp_path / "other.onnx")


@pytest.mark.parametrize("location", ["../secret.data", "{folder}/secret.data", "link.data"])
def test_weights_outside_of_the_files_folder_are_not_read(tmp_path, location):
    (tmp_path / "secret.data").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link.data").symlink_to(tmp_path / "secret.data")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location.format(folder=tmp_path))
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    path = tmp_path / "inside" / "model.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ptq.PTQError, match=r"read ONNX file: .*the weights w lie outside of the file's folder"):
        load_file(path)
