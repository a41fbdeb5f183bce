"""`ptq4vit verify`: a file in ONNX Runtime by its defaults, in OpenVINO and in onnxruntime-web, site by site."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from trap_models import quantized_product, sixteen_by_eight

import ptq4vit_fx as ptq
from ptq4vit_fx.export.model_files import load_file, message_of
from ptq4vit_fx.export.proof.other_runtimes import FOR_ONNXRUNTIME, verify_runtime
from ptq4vit_fx.export.proof.runtime import products_saturate
from ptq4vit_fx.export.proof.web_runtime import open_in_web

NPM = Path(__file__).resolve().parents[1] / "examples" / "browser"
needs_web = pytest.mark.skipif(
    shutil.which("node") is None or not (NPM / "node_modules" / "onnxruntime-web").is_dir(),
    reason="node or the npm packages of examples/browser are not there: `make browser` installs them",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_vit, small_images):
    """Files of two targets. W7: without VNNI, OpenVINO's kernels saturate on 8-bit weights (docs/targets.md)."""
    folder = tmp_path_factory.mktemp("runtimes")
    mapping = ptq.recipes.ptq4vit(7, 8).with_search(n=8, rounds=1)
    converted = ptq.quantize(small_vit, small_images, qconfig_mapping=mapping, progress=False)
    for target in ("onnxruntime", "openvino"):
        ptq.export_onnx(converted, folder / f"{target}.onnx", small_images[:1], target=target)
    return folder


def verified(path, images, runtime, **options):
    batches = [(images[:8],), (images[8:],)]
    return verify_runtime(path, batches, runtime=runtime, npm=NPM, layers=3, **options)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_onnx_runtime_computes_the_file_as_it_is_written(files, small_images, target):
    report = verified(files / f"{target}.onnx", small_images, "onnxruntime")
    assert report.ok
    assert report.comparison.images == 12
    assert {site.images for site in report.layers.sites} == {3}
    assert report.layers.first_divergence is None
    assert not report.layers.missing
    assert "blocks.0.attn.matmul_av:lhs_fine" in [site.site for site in report.layers.sites]
    assert json.loads(json.dumps(report.to_dict()))["first_divergence"] is None


@sixteen_by_eight
def test_a_trap_is_seen_in_the_numbers_and_named(tmp_path, small_images):
    product = quantized_product("int16", "int8")
    ir.save(product.model, tmp_path / "trap.onnx")
    batch = torch.from_numpy(product.values.repeat(4, 0))
    report = verify_runtime(tmp_path / "trap.onnx", [(batch,)], runtime="onnxruntime", layers=2)
    assert report.comparison.bit_equal == 0
    assert 1e-3 < report.comparison.max_relative_difference < 0.05
    assert "trap: ONNX Runtime on CPUs: fc: 16-bit activations" in str(report)
    failing = quantized_product("int8", "int8", 32)
    (tmp_path / "fails.onnx").write_bytes(message_of(failing.model).SerializeToString())
    with pytest.raises(ptq.PTQError, match=r"verify: .*fails.onnx: fc: expected a file that runs, got 8-bit act"):
        verify_runtime(tmp_path / "fails.onnx", [(batch,)], runtime="onnxruntime")


def test_openvino_gives_the_codes_of_every_site(files, small_images):
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    report = verified(files / "openvino.onnx", small_images, "openvino")
    assert report.ok
    assert report.runtime.startswith("OpenVINO 20")
    assert report.note == ""
    assert report.traps == ()
    assert not report.layers.missing
    sites = {site.site: site for site in report.layers.sites}
    assert sites["blocks.0.attn.qkv:lhs"].images == 3
    assert min(site.equal for site in report.layers.sites) > 0.99  # its LayerNorm rounds a value to the other code
    assert max(site.largest_difference for site in report.layers.sites) <= 1
    assert verified(files / "onnxruntime.onnx", small_images, "openvino").note == FOR_ONNXRUNTIME


@needs_web
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_webassembly_gives_every_bit(files, small_images, target):
    report = verified(files / f"{target}.onnx", small_images, "web")
    assert report.runtime.startswith("onnxruntime-web 1.")
    assert report.comparison.bit_equal == 1
    assert report.layers.first_divergence is None


@needs_web
def test_what_webassembly_refuses_is_one_sentence(tmp_path, files):
    model = ir.load(files / "onnxruntime.onnx")
    next(node for node in model.graph if node.op_type == "Softmax").domain = "of.somebody.else"
    ir.save(model, tmp_path / "unknown.onnx")
    refused = pytest.raises(ptq.PTQError, match=r"onnxruntime-web: .*unknown\.onnx: .*got Error: .*; look at that op")
    with refused, open_in_web(tmp_path / "unknown.onnx", model, NPM):
        pass
    with (
        pytest.raises(ptq.PTQError, match=r"onnxruntime-web: .*got Error: .*dimensions"),
        open_in_web(files / "onnxruntime.onnx", load_file(files / "onnxruntime.onnx"), NPM) as opened,
    ):
        opened.run([np.zeros((1, 3, 8, 8), np.float32)])


def test_what_is_missing_is_said_in_one_sentence(tmp_path, monkeypatch, files, small_images):
    path = files / "openvino.onnx"
    with pytest.raises(ptq.PTQError, match="expected one of onnxruntime, openvino, web, got 'wasm'"):
        verified(path, small_images, "wasm")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ptq.PTQError, match=r"pip install 'ptq4vit-fx\[openvino\]'"):
        verified(path, small_images, "openvino")
    program = tmp_path / "node"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ptq.PTQError, match=r"expected npm's package onnxruntime-web.*npm install"):
        verify_runtime(path, [(small_images,)], runtime="web", npm=tmp_path)
    program.unlink()
    with pytest.raises(ptq.PTQError, match=r"node: expected the program on the PATH, got none; install Node\.js"):
        verify_runtime(path, [(small_images,)], runtime="web", npm=tmp_path)


def test_a_fixed_batch_runs_whole(tmp_path, small_converted, small_images):
    ptq.export_onnx(small_converted, tmp_path / "model.onnx", small_images[:1], batch=5)
    report = verify_runtime(tmp_path / "model.onnx", [(small_images,)], runtime="onnxruntime", layers=6)
    assert report.comparison.images == 12
    assert {site.images for site in report.layers.sites} == {10}
    assert report.ok or products_saturate()
    assert np.isfinite(report.comparison.cosine)
