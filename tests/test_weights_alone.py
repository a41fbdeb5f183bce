"""Weights alone: quantizers, float activations beside them, files of the targets that hold them, forms of tune."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from onnx import TensorProto
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.export.contract import Target
from ptq4vit_fx.export.proof.inspection import inspect_file
from ptq4vit_fx.export.proof.openvino_runtime import FLOAT32
from ptq4vit_fx.export.scales import read_scales
from ptq4vit_fx.export.targets import TARGETS
from ptq4vit_fx.inputs.records import Place
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.quantizers import NoParams, UniformParams, Unquantized, of_bits, quantizer_from_dict, quantizer_to_dict
from ptq4vit_fx.tools.cli import app
from ptq4vit_fx.tuning.forms import default_forms, form_of

ALONE = ptq.recipes.ptq4vit(4, 32).with_search(n=20, rounds=1)


@pytest.fixture(scope="module")
def prepared(small_vit, small_images):
    found = ptq.prepare_fx(small_vit, ALONE, small_images[:1])
    ptq.calibrate(found, small_images, progress=False)
    return found


def test_the_quantizer_leaves_values_and_has_no_codes():
    x, quantizer = torch.tensor([1e30, -0.3, float("nan")]), Unquantized()
    given = quantizer.fake_quantize(x, NoParams())
    assert torch.equal(given.nan_to_num(7), x.nan_to_num(7))
    assert given.data_ptr() != x.data_ptr()
    assert quantizer_from_dict(quantizer_to_dict(quantizer)) == quantizer
    assert (quantizer.bits, quantizer.describe()) == (32, "float")
    with pytest.raises(NotImplementedError, match="has no codes"):
        quantizer.codes(x, NoParams())
    with pytest.raises(ptq.PTQError, match=r"s: expected NoParams, got UniformParams"):
        quantizer.check(UniformParams(torch.tensor(1.0)), Place("test", "s", do="no"))
    with pytest.raises(ptq.PTQError, match="8 bits: expected a grid that may have other bits, got none"):
        of_bits(quantizer, 8)


def test_the_plan_quantizes_weights_and_nothing_else(prepared):
    plan = plan_of(prepared)
    for op in plan.ops:
        assert op.rhs_is_weight
        assert plan.quantizers[f"{op.name}:lhs"] == Unquantized()
        assert plan.quantizers[f"{op.name}:rhs"].bits == 4
    assert {op.name: op.reason for op in plan.float_ops} == {
        f"blocks.{block}.attn.matmul_{part}": "both operands are activations, which stay float"
        for block in range(2)
        for part in ("qk", "av")
    }
    assert str(plan.average_bits()).startswith("weights 4.00, activations 32.00")
    assert len(plan.grids) == len(plan.ops) == len(plan.quantizers) // 2


def test_nobody_is_warned_of_products_that_the_recipe_leaves_float(small_vit, small_images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ptq.prepare_fx(small_vit, ALONE, small_images[:1])


def test_the_simulation_is_the_float_model_with_those_weights(small_vit, small_images, prepared):
    """An oracle: the model's own forward, with each weight in the place of what its codes stand for."""
    calibration, changed = prepared.calibration, dict(small_vit.state_dict())
    for op in plan_of(prepared).ops:
        params = calibration.params[f"{op.name}:rhs"]
        scale = params.scale.view(-1, *[1] * (changed[f"{op.name}.weight"].ndim - 1)).numpy()
        weight = changed[f"{op.name}.weight"].numpy()
        changed[f"{op.name}.weight"] = torch.from_numpy(np.clip(np.rint(weight / scale), -8, 7) * scale)
    expected = torch.func.functional_call(small_vit, changed, small_images)
    torch.testing.assert_close(ptq.convert_fx(prepared)(small_images), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, small_vit(small_images), atol=1e-4)


def test_a_calibration_of_them_comes_back_from_its_file(prepared, tmp_path):
    prepared.calibration.save(tmp_path / "c.safetensors")
    again = ptq.Calibration.load(tmp_path / "c.safetensors")
    assert again.fingerprint() == prepared.calibration.fingerprint()
    assert again.params.keys() == prepared.calibration.params.keys()
    assert prepared.calibration.snr["head:lhs"] == float("inf")
    assert "head:lhs" in str(again.report())


def test_the_search_beside_float_activations_is_the_best_candidate(small_images):
    """One product, every candidate by hand: the scale whose weight gives the least squared error of the output."""
    torch.manual_seed(3)
    layer, x = torch.nn.Linear(48, 1, bias=False), small_images.reshape(-1, 48)
    recipe = ALONE.with_search(metric="mse", n=30)
    prepared = ptq.prepare_fx(torch.nn.Sequential(layer), recipe, x[:1])
    ptq.calibrate(prepared, x, progress=False, loss=lambda out, *_: out.square().sum())
    (name,) = (op.name for op in plan_of(prepared).ops)
    weight, initial = layer.weight.detach(), layer.weight.detach().abs().max() / 8
    scales = initial * torch.tensor(recipe.global_qconfig.search.factors)
    errors = [float(F.mse_loss(x @ ((weight / s).round().clamp(-8, 7) * s).T, x @ weight.T)) for s in scales]
    assert float(prepared.calibration.params[f"{name}:rhs"].scale) == pytest.approx(float(scales[np.argmin(errors)]))


def test_the_generic_file_has_weights_of_four_bits_and_computes_the_simulation(prepared, small_images, tmp_path):
    converted, path = ptq.convert_fx(prepared), tmp_path / "m.onnx"
    report = ptq.export_onnx(converted, path, small_images[:1], target="generic", opset=21)
    assert report.sites == 10
    graph = onnx.load(path).graph
    types = {constant.name: constant.data_type for constant in graph.initializer}
    dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(dequantized) == 10
    assert {types[node.input[0]] for node in dequantized} == {TensorProto.INT4}
    assert not [node for node in graph.node if node.op_type == "QuantizeLinear"]
    verified = ptq.verify_onnx(path, converted, small_images)
    assert verified.ok
    same = verified.same_functions
    assert same.max_absolute_difference <= 1e-5 * float(converted(small_images).abs().max())
    assert verified.code_comparison.first_divergence is None
    assert [trap.name for trap in verified.traps] == ["weights alone"]
    assert read_scales(path).keys() == plan_of(prepared).grids.keys()
    inspected = inspect_file(path)
    assert {product.operator for product in inspected.graph.products if product.integer} == {"MatMulNBits"}


def test_codes_behind_them_are_compared_with_float_activations_too(small_vit, small_images, tmp_path):
    """Left alone, the runtime would quantize the one layer's input, and most codes behind it would be others."""
    recipe = ptq.recipes.best().with_bits("blocks.0.mlp.fc1", w=4, a=32).with_search(n=20, rounds=1)
    prepared = ptq.prepare_fx(small_vit, recipe, small_images[:1])
    ptq.calibrate(prepared, small_images, progress=False)
    converted, path = ptq.convert_fx(prepared), tmp_path / "m.onnx"
    ptq.export_onnx(converted, path, small_images[:1], target="generic", opset=21)
    layers = ptq.verify_onnx(path, converted, small_images).code_comparison
    assert min(site.equal for site in layers.sites) > 0.99
    assert len(layers.sites) > 20


def test_openvino_multiplies_floats_with_the_weights(prepared, small_images, tmp_path):
    openvino = pytest.importorskip("openvino")
    converted, path = ptq.convert_fx(prepared), tmp_path / "m.onnx"
    ptq.export_onnx(converted, path, small_images[:1], target="openvino")
    compiled = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", FLOAT32)
    expected = converted(small_images).detach().numpy()
    np.testing.assert_allclose(compiled(small_images.numpy())[0], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-avx2", "onnxruntime-arm"])
def test_onnx_runtime_would_quantize_the_activations_so_it_is_refused(prepared, small_images, tmp_path, target):
    with pytest.raises(ptq.PTQError, match=r"weights alone: only the weights are quantized in the file, and it"):
        ptq.export_onnx(ptq.convert_fx(prepared), tmp_path / "m.onnx", small_images[:1], target=target)
    assert list(tmp_path.iterdir()) == []


def test_forms_of_weights_alone_are_tuned_beside_the_others(small_vit, small_images, tmp_path):
    prepared = ptq.prepare_fx(small_vit, ptq.recipes.best().with_search(n=20, rounds=1), small_images[:1])
    forms = ["w8a8", "w8a32", "w4a32", "float"]
    tuned = ptq.tune(
        prepared,
        small_images[:4],
        held_out=small_images[4:],
        kl=2e-4,
        minimize="size",
        target="generic",
        opset=21,
        forms=forms,
        progress=False,
    )
    table = {(cost.product, cost.form) for cost in tuned.sensitivity.costs}
    assert ("head", "w4a32") in table
    assert ("blocks.0.attn.matmul_qk", "w4a32") not in table  # it is float there, which is a form already
    path = tmp_path / "m.onnx"
    ptq.export_onnx(ptq.convert_fx(tuned.prepared), path, small_images[:1], target="generic", opset=21)
    with pytest.raises(ptq.PTQError, match="target onnxruntime: expected quantized activations beside"):
        ptq.tune(prepared, small_images[:4], held_out=small_images[4:], kl=1e-3, forms=forms, progress=False)


def test_four_bits_in_a_file_stand_beside_float_activations():
    """No CPU multiplies weights of 4 bits with activations of 8: measured, such a file takes several times as long."""
    packed, plain = TARGETS["generic"], TARGETS["onnxruntime"]
    assert [form.name for form in default_forms("size", packed)] == ["w8a8", "w4a32", "float"]
    assert [form.name for form in default_forms("size", plain)] == ["w8a8", "w4a8", "float"]
    assert default_forms("time", packed) == default_forms("time", plain)
    assert isinstance(packed, Target)


@pytest.mark.parametrize("name", ["w9a32", "w4a32 uniform", "w4a16", "w32a8", f"w4a{'9' * 5000}"])
def test_forms_that_are_none_are_refused(name):
    with pytest.raises(ptq.PTQError, match=r"expected float, exact, uniform, or bits such as w8a8"):
        form_of(name)


def test_the_command_line_says_what_runtimes_make_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    save_file(model.state_dict(), "w.safetensors")
    named = ["deit_tiny_patch16_224", "--weights", "w.safetensors"]
    named += [part for size in ("img_size=32", "depth=1", "num_classes=3") for part in ("--model-arg", size)]
    asked = ["--w-bits", "4", "--a-bits", "32", "--target", "generic", "--opset", "21", "--images", "4"]
    done = CliRunner().invoke(app, ["quantize", *named, "--data", "images", "--out", "m.onnx", *asked])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "W4A32" in said
    assert "2 products left float, 6 products with float activations" in said
    assert 'set session.qdq_matmulnbits_accuracy_level to "1"' in said
    why = ["why", "m.onnx", "--data", "images", "--weights", "w.safetensors"]
    for command in (["inspect", "m.onnx"], ["report", "m.onnx", "-o", "r.html"], why):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("make", [ptq.recipes.best, ptq.recipes.ptq4vit])
def test_other_bits_are_refused(make):
    with pytest.raises(ptq.PTQError, match="bits: expected an integer from 2 to 8, got 16"):
        make(8, 16)
    with pytest.raises(ptq.PTQError, match="bits: expected an integer from 2 to 8, got 32"):
        make(32, 8)
    assert make(4, 32).recipe.startswith(f"{make.__name__}(4, 32")
