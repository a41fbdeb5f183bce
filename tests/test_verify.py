"""verify_onnx layer by layer: equal on a good file, and the right site first on a bad one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.proof.layers import add_outputs, compare_layers
from ptq4vit_fx.export.proof.runtime import open_session, optimized
from ptq4vit_fx.export.stored_sites import StoredSite, integers, stored_sites


@pytest.fixture(scope="module")
def converted(small_vit, small_images):
    mapping = ptq.recipes.ptq4vit().with_search(n=8, rounds=1)
    return ptq.quantize(small_vit, small_images, qconfig_mapping=mapping, progress=False)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory, converted, small_images):
    path = tmp_path_factory.mktemp("verify") / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1])
    return path


def changed_file(source, target, name, change):
    """Write the file with one initializer changed; return its path."""
    model = onnx.load(source)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    onnx.save(model, target)
    return target


def test_all_codes_of_all_sites_are_equal(good_file, converted, small_images):
    report = ptq.verify_onnx(good_file, converted, small_images)
    names = [layer.site for layer in report.layers]
    plan = converted.plan.quantizers
    twins = [site for site, quantizer in plan.items() if isinstance(quantizer, ptq.TwinUniform)]
    branches = {f"{site}_{branch}" for site in twins for branch in ("fine", "coarse")}
    assert twins
    assert set(names) == (set(plan) - set(twins)) | branches
    assert (
        names.index("blocks.0.attn.qkv:lhs") < names.index("blocks.0.attn.matmul_av:lhs_fine") < names.index("head:lhs")
    )
    assert all(layer.equal == 1.0 and layer.same_scale and layer.largest_difference == 0 for layer in report.layers)
    assert {layer.images for layer in report.layers} == {0, 8}
    assert report.first_divergence is None
    assert not report.code_comparison.missing
    assert not report.code_comparison.disturbed
    assert f"all codes of {len(names)} sites are equal" in str(report)
    assert report.ok
    figures = json.loads(json.dumps(report.to_dict()))
    assert (figures["ok"], figures["images"], figures["sites_compared"]) == (True, 12, len(names))
    assert figures["first_divergence"] is None


CHANGES = {
    "blocks.0.attn.matmul_av:lhs_fine.scale": "blocks.0.attn.matmul_av:lhs_fine",
    "blocks.1.mlp.fc2:lhs_fine.scale": "blocks.1.mlp.fc2:lhs_fine",
    "blocks.1.attn.qkv:lhs.scale": "blocks.1.attn.qkv:lhs",
    "blocks.0.mlp.fc1:rhs.scale": "blocks.0.mlp.fc1:rhs",
    "blocks.0.mlp.fc1.rhs.codes": "blocks.0.mlp.fc1:rhs",
    "pos_embed": "blocks.0.attn.qkv:lhs",
}


@pytest.mark.parametrize("initializer", CHANGES)
def test_one_wrong_number_is_found_where_it_is(tmp_path, good_file, converted, small_images, initializer):
    def change(values):
        return 1 - values if values.dtype == np.int8 else values * np.float32(1.25)

    path = changed_file(good_file, tmp_path / "bad.onnx", initializer, change)
    report = ptq.verify_onnx(path, converted, small_images)
    site = CHANGES[initializer]
    assert report.first_divergence.site == site
    assert f"first {site}, " in str(report)
    position = [layer.site for layer in report.layers].index(site)
    assert not any(layer.differs for layer in report.layers[:position])
    assert any(layer.equal < 1.0 for layer in report.layers[position:])
    assert report.first_divergence.same_scale == (not initializer.endswith("scale"))
    assert not report.ok or initializer == "pos_embed"  # other values in front of the first site are another model
    assert report.to_dict()["first_divergence"] == site


def test_batches_of_any_size_count_the_first_images(good_file, converted, small_images, monkeypatch):
    plain = open_session(good_file)
    ragged = [(batch,) for batch in small_images.split([1, 5, 2, 4])]
    seven = compare_layers(converted, good_file, plain, ragged, 7)
    assert {layer.images for layer in seven.sites} == {0, 7}
    assert seven.first_divergence is None
    assert {layer.images for layer in compare_layers(converted, good_file, plain, ragged, 100).sites} == {0, 12}
    monkeypatch.setattr("ptq4vit_fx.export.proof.layers.CODES_AT_ONCE", 1)  # one image at a time
    assert compare_layers(converted, good_file, plain, ragged, 7) == seven


def test_a_fixed_batch_runs_whole(tmp_path, good_file, converted, small_images):
    model = onnx.load(good_file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "fixed.onnx")
    report = ptq.verify_onnx(tmp_path / "fixed.onnx", converted, small_images.split(3), layers=4)
    assert {layer.images for layer in report.layers} == {0, 6}
    assert report.first_divergence is None


def test_codes_of_another_graph_are_said_to_be_so(tmp_path, good_file, converted, small_images):
    path = changed_file(good_file, tmp_path / "other.onnx", "head.bias", lambda values: values + 1)
    compared = compare_layers(converted, good_file, open_session(path), [(small_images,)], 2)
    assert compared.first_divergence is None
    assert "it runs another graph then" in str(compared)


def test_layers_can_be_left_out(good_file, converted, small_images):
    without = ptq.verify_onnx(good_file, converted, small_images[:1], layers=0)
    assert without.layers == ()
    assert without.first_divergence is None
    assert "layer by layer" not in str(without)


def test_reading_the_codes_changes_no_fusion(good_file):
    read = tuple(s.tensor for s in stored_sites(load_file(good_file)).values() if s.codes is None)
    with_outputs = load_file(good_file)
    add_outputs(with_outputs, read)
    kinds = [sorted(node.op_type for node in optimized(model).graph) for model in (load_file(good_file), with_outputs)]
    assert "MatMulIntegerToFloat" in kinds[0]
    assert kinds[0] == kinds[1]


def test_scales_per_head_are_read_where_the_quantizer_has_others(good_file, converted):
    stored = stored_sites(load_file(good_file))
    per_head = [site for site, q in converted.plan.quantizers.items() if getattr(q, "granularity", "") == "head"]
    assert len(per_head) == 6
    for site in per_head:
        scale = converted.calibration.params[site].scale
        assert torch.equal(torch.from_numpy(stored[site].calibrated.copy()), scale)
        assert stored[site].scale == 2.0 ** round(float(scale.log2().mean()))
    weight = stored["blocks.0.attn.qkv:rhs"]
    assert weight.calibrated is not None
    assert torch.equal(
        torch.from_numpy(weight.calibrated.copy()), converted.calibration.params["blocks.0.attn.qkv:rhs"].scale
    )
    assert not np.array_equal(weight.scale, weight.calibrated)
    assert stored["head:lhs"].calibrated is None


def test_containers_do_not_matter():
    """The codes -3, 0, 5 in uint8 with zero point 128, in int8 with 0, and per channel in uint8."""
    codes = np.array([[-3, 0, 5]])
    site = StoredSite("x", None, np.float32(1), np.array(128), 1, "x")
    assert (integers((codes + 128).astype(np.uint8), site) == codes).all()
    assert (integers(codes.astype(np.int8), replace(site, zero_point=np.array(0))) == codes).all()
    zero = np.array([3, 100, 250])
    assert (integers((codes + zero).astype(np.uint8), replace(site, zero_point=zero)) == codes).all()


def test_int8_activations_have_the_same_codes(tmp_path, good_file, converted, small_images):
    """A target that wants int8 activations moves codes and zero points by 128."""
    model = onnx.load(good_file)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("zero_point") and tensor.data_type == onnx.TensorProto.UINT8:
            moved = (numpy_helper.to_array(tensor).astype(np.int16) - 128).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "signed.onnx")
    report = ptq.verify_onnx(tmp_path / "signed.onnx", converted, small_images[:2])
    assert report.first_divergence is None
    assert len(report.layers) == 32


class Separate(nn.Module):
    """Two projections of the same values, whose equal quantizers the exporter merges into one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        return self.out(self.query(x) + self.key(x)).mean(1)


def test_merged_quantizers_are_found_through_their_products(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(4, 8, 4, 4)
    mapping = ptq.recipes.ptq4vit().with_search(n=2, rounds=1)
    prepared = ptq.prepare_fx(Separate().eval(), mapping, images[:1])
    calibration = ptq.calibrate(prepared, images, progress=False)
    shared = {"key:lhs": calibration.params["query:lhs"]}
    ptq.load_calibration(prepared, replace(calibration, params=calibration.params | shared))
    converted = ptq.convert_fx(prepared)
    path = tmp_path / "model.onnx"
    assert ptq.export_onnx(converted, path, images[:1]).operators["QuantizeLinear"] == 2
    report = ptq.verify_onnx(path, converted, images)
    assert len(report.layers) == 6
    assert report.first_divergence is None
    assert not report.code_comparison.missing


def test_a_site_that_the_file_lacks_is_named(tmp_path, good_file, converted, small_images):
    model = onnx.load(good_file)
    for number, node in enumerate(model.graph.node):
        if node.name.startswith(("blocks.0.mlp.fc1:lhs", "blocks.0.mlp.fc1/MatMul")):
            node.name = f"nameless_{number}"
    onnx.save(model, tmp_path / "renamed.onnx")
    report = ptq.verify_onnx(tmp_path / "renamed.onnx", converted, small_images[:2])
    assert report.code_comparison.missing == ("blocks.0.mlp.fc1:lhs",)
    assert "not in the file, not compared: blocks.0.mlp.fc1:lhs" in str(report)
