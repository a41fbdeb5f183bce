"""A fused projection becomes one product each for q, k and v in files for ONNX Runtime: the same codes and logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import model_of
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.export.integer_products import in_qdq_form
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.export.proof.runtime_graph import runtime_graph
from ptq4vit_fx.export.scales import read_scales
from ptq4vit_fx.export.stored_sites import stored_sites
from ptq4vit_fx.quantizers import UniformParams

HEADS, DIM = 3, 4
WIDTH = HEADS * DIM
X = torch.randn(4, WIDTH, 2, 3, generator=torch.Generator().manual_seed(0))


def fused(module, x):
    return module.qkv(x.flatten(2).transpose(1, 2))


def attend(q, k, v):
    return (torch.softmax(q @ k.transpose(-2, -1), -1) @ v).transpose(1, 2).flatten(2).amax(1)


def by_unbind(module, x):
    qkv = fused(module, x).reshape(x.shape[0], 6, 3, HEADS, DIM)
    return attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0))


def by_index(module, x):
    qkv = fused(module, x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
    return attend(qkv[0], qkv[1], qkv[2])


def in_another_order(module, x):
    v, q, k = fused(module, x).reshape(x.shape[0], 6, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(q, k, v)


def heads_first(module, x):
    q, k, v = fused(module, x).reshape(x.shape[0], 6, HEADS, 3, DIM).permute(3, 0, 2, 1, 4).unbind(0)
    return attend(q, k, v)


def read_elsewhere(module, x):
    qkv = fused(module, x)
    parts = qkv.reshape(x.shape[0], 6, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(*parts) + qkv[:, 0, :WIDTH]


def without_v(module, x):
    qkv = fused(module, x).reshape(x.shape[0], 6, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
    return attend(qkv[0], qkv[1], qkv[1])


def quantized(function, weights="channel", bias=True):
    model = model_of(function, qkv=nn.Linear(WIDTH, 3 * WIDTH, bias), head=nn.Linear(WIDTH, 5))
    recipe = ptq.recipes.ptq4vit(8, 8, weights).with_search(n=4, rounds=1)
    prepared = ptq.prepare_fx(model, recipe, X)
    ptq.calibrate(prepared, X, progress=False)
    return ptq.convert_fx(prepared)


def projections(path):
    return [
        node for node in in_qdq_form(load_file(path)).graph if node.op_type == "MatMul" and node.name.startswith("qkv/")
    ]


def run(path):
    return open_session(path).run(None, {"image": X.numpy()})[0]


@pytest.mark.parametrize("weights", ["channel", "group"])
@pytest.mark.parametrize("function", [by_unbind, by_index, in_another_order])
def test_three_products_with_the_codes_and_scales_of_one(tmp_path, function, weights):
    converted = quantized(function, weights)
    one, three = tmp_path / "one.onnx", tmp_path / "three.onnx"
    ptq.export_onnx(converted, one, X, target="generic")
    ptq.export_onnx(converted, three, X)
    assert (len(projections(one)), len(projections(three))) == (1, 3)
    names = [node.name for node in load_file(three).graph]
    assert len(set(names)) == len(names)
    assert np.array_equal(run(one), run(three))
    mine, theirs = (stored_sites(load_file(path)) for path in (three, one))
    assert mine.keys() == theirs.keys()
    assert mine["qkv:rhs"].codes is not None
    assert theirs["qkv:rhs"].codes is not None
    assert np.array_equal(mine["qkv:rhs"].codes, theirs["qkv:rhs"].codes)
    assert np.array_equal(mine["qkv:rhs"].scale, theirs["qkv:rhs"].scale)
    for site, params in converted.calibration.params.items():
        if isinstance(params, UniformParams):
            assert np.array_equal(read_scales(three)[site].scale, params.scale.numpy()), site
    verified = ptq.verify_onnx(three, converted, X)
    assert verified.same_functions.bit_equal == 1.0
    assert all(site.equal == 1.0 and site.same_scale for site in verified.layers)
    assert not verified.code_comparison.missing
    assert not runtime_graph(load_file(three)).float_products


@pytest.mark.parametrize("function", [heads_first, read_elsewhere, without_v])
def test_what_is_no_projection_of_three_stays_one_product(tmp_path, function):
    converted = quantized(function)
    ptq.export_onnx(converted, tmp_path / "model.onnx", X)
    assert len(projections(tmp_path / "model.onnx")) == 1
    assert ptq.verify_onnx(tmp_path / "model.onnx", converted, X).same_functions.bit_equal == 1.0


def test_scales_per_head_behind_a_transpose_are_divided_in_front_of_the_quantizer(tmp_path):
    """The runtime would quantize in front of the transpose as well."""
    ptq.export_onnx(quantized(read_elsewhere), tmp_path / "model.onnx", X)
    report = runtime_graph(load_file(tmp_path / "model.onnx"))
    assert report.after["Div"] == 3  # q, k and v
    assert report.after["QuantizeLinear"] == report.before["QuantizeLinear"]
    assert not report.leftovers


@pytest.mark.parametrize(("batch", "products"), [(1, 1), (4, 3)])
def test_one_image_at_a_time_is_faster_with_one_product(tmp_path, batch, products):
    converted = quantized(by_unbind)
    ptq.export_onnx(converted, tmp_path / "model.onnx", X, batch=batch)
    assert len(projections(tmp_path / "model.onnx")) == products
    assert not runtime_graph(load_file(tmp_path / "model.onnx")).float_products


@pytest.mark.parametrize("target", ["openvino", "generic"])
def test_other_targets_keep_one_product(tmp_path, target):
    ptq.export_onnx(quantized(by_unbind), tmp_path / "model.onnx", X, target=target)
    assert len(projections(tmp_path / "model.onnx")) == 1


def test_a_projection_without_bias(tmp_path):
    converted = quantized(by_unbind, bias=False)
    ptq.export_onnx(converted, tmp_path / "model.onnx", X)
    assert len(projections(tmp_path / "model.onnx")) == 3
    assert ptq.verify_onnx(tmp_path / "model.onnx", converted, X).same_functions.bit_equal == 1.0
