"""The whole pipeline on a small model, first and in seconds."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.trace import trace


def test_trace_is_bit_equal_and_leaves_the_model_alone(small_vit, small_images):
    before = copy.deepcopy(small_vit.state_dict())
    graph = trace(small_vit)
    for batch in (1, 4):
        assert torch.equal(graph(small_images[:batch]), small_vit(small_images[:batch]))
    prepared = ptq.prepare_fx(small_vit, ptq.recipes.ptq4vit(), small_images[:1])
    assert type(small_vit).__name__ == "VisionTransformer"
    assert all(torch.equal(before[key], value) for key, value in small_vit.state_dict().items())
    torch.testing.assert_close(prepared(small_images), small_vit(small_images), rtol=1e-5, atol=1e-5)


def test_every_product_has_a_site_and_its_source_is_seen(small_vit, small_images):
    plan = ptq.prepare_fx(small_vit, ptq.recipes.ptq4vit(), small_images[:1]).plan
    names = [op.name for op in plan.ops]
    layers = ("attn.qkv", "attn.matmul_qk", "attn.matmul_av", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == ["patch_embed.proj", *(f"blocks.{b}.{layer}" for b in (0, 1) for layer in layers), "head"]
    assert plan.op("blocks.0.attn.matmul_av").lhs_source == "softmax"
    assert plan.op("blocks.1.mlp.fc2").lhs_source == "gelu"
    assert plan.quantizers["blocks.0.attn.qkv:rhs"] == ptq.Uniform(8, granularity="channel")
    assert plan.quantizers["patch_embed.proj:lhs"] == ptq.Uniform(8)
    assert ptq.QuantPlan.from_json(plan.to_json()) == plan


def test_four_bits_leave_the_image_at_eight_and_group_weights_as_the_paper(small_vit, small_images):
    mapping = ptq.recipes.ptq4vit(4, 4, weights="group")
    quantizers = ptq.prepare_fx(small_vit, mapping, small_images[:1]).plan.quantizers
    assert quantizers["patch_embed.proj:lhs"] == ptq.Uniform(8)
    assert quantizers["patch_embed.proj:rhs"] == ptq.Uniform(4, granularity="channel")
    assert quantizers["blocks.0.attn.qkv:rhs"] == ptq.Uniform(4, granularity="group", groups=3)
    assert quantizers["blocks.0.attn.proj:rhs"] == ptq.Uniform(4)
    assert quantizers["head:lhs"] == ptq.Uniform(4)


def test_int8_simulation_is_close_to_float(small_vit, small_images, small_converted):
    reference = small_vit(small_images)
    error = (small_converted(small_images) - reference).norm() / reference.norm()
    assert error < 0.02


def test_same_seed_same_scales(small_vit, small_images, small_converted):
    again = ptq.quantize(small_vit, small_images, progress=False)
    assert again.calibration.fingerprint() == small_converted.calibration.fingerprint()


def test_calibration_file_round_trip(tmp_path, small_vit, small_images, small_converted):
    path = tmp_path / "scales.safetensors"
    small_converted.calibration.save(path)
    loaded = ptq.Calibration.load(path)
    assert loaded.fingerprint() == small_converted.calibration.fingerprint()
    other = ptq.prepare_fx(small_vit, ptq.recipes.base_ptq(), small_images[:1])
    with pytest.raises(ptq.PTQError, match="load_calibration"):
        ptq.load_calibration(other, loaded)


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-avx2"])
def test_onnx_is_standard_integer_and_agrees(tmp_path, small_images, small_converted, target):
    path = tmp_path / "model.onnx"
    ptq.export_onnx(small_converted, path, small_images[:1], target=target)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert any(node.name == "blocks.1.attn.matmul_qk/MatMulInteger" for node in model.graph.node)
    for batch in (1, 4, 7):
        report = ptq.verify_onnx(path, small_converted, small_images[:batch])
        assert report.images == batch
        assert report.simulation.cosine > 0.9999
        assert report.same_functions.bit_equal == 1.0
    assert "to the last bit" in str(report)
    assert not report.graph.float_products
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_other_opsets_compute_the_same(tmp_path, small_images, small_converted, opset):
    path = tmp_path / "model.onnx"
    with pytest.raises(ptq.PTQError, match="expected 17 to"):
        ptq.export_onnx(small_converted, path, small_images[:1], opset=16)
    assert not path.exists()
    ptq.export_onnx(small_converted, path, small_images[:1], opset=opset)
    assert {entry.version for entry in onnx.load(path).opset_import} == {opset}
    report = ptq.verify_onnx(path, small_converted, small_images)
    assert report.simulation.cosine > 0.9999
    assert report.graph.integer_products


def test_errors_are_sentences(tmp_path, small_vit, small_images):
    prepared = ptq.prepare_fx(small_vit, ptq.recipes.ptq4vit(), small_images[:1])
    with pytest.raises(ptq.PTQError, match="call calibrate"):
        ptq.convert_fx(prepared)
    with pytest.raises(ptq.PTQError, match="expected one image or more"):
        ptq.calibrate(prepared, small_images[:0], progress=False)
    bad = small_images.clone()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(ptq.PTQError, match="batch 0, image 3"):
        ptq.calibrate(prepared, bad, progress=False)
    mapping = ptq.recipes.ptq4vit().set_module_name_regex("block.*qvk", None)
    with pytest.raises(ptq.PTQError, match="near names"):
        ptq.prepare_fx(small_vit, mapping, small_images[:1])
    with pytest.raises(ptq.PTQError, match="size that the model accepts"):
        ptq.prepare_fx(small_vit, ptq.recipes.ptq4vit(), torch.randn(1, 3, 20, 20))


class Branching(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else x


def test_untraceable_model_names_the_line():
    with pytest.raises(ptq.PTQError, match=r"if x.sum\(\) > 0"):
        ptq.prepare_fx(Branching(), ptq.recipes.ptq4vit(), torch.randn(1, 1, 4, 4))
