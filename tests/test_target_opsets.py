"""Every target at every opset and batch form: the same logits to the last bit, in the runtime that it is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from runtime_opsets import newest_in_runtime
from timm.models.vision_transformer import VisionTransformer
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.opsets import newest_opset
from ptq4vit_fx.export.proof.runtime import open_session, quiet_options
from ptq4vit_fx.export.proof.runtime_graph import runtime_graph
from ptq4vit_fx.export.targets import TARGETS

#: None is a dynamic batch.
BATCHES = (None, 1, 4)


@pytest.fixture(scope="module")
def converted(small_images) -> dict[str, GraphModule]:
    """Recipe -> converted model of one block; what TensorRT takes has no twin behind softmax."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5).eval()
    recipes = {"ptq4vit": ptq.recipes.ptq4vit(), "tensorrt": ptq.recipes.tensorrt()}
    quick = {name: recipe.with_search(n=8, rounds=1) for name, recipe in recipes.items()}
    return {
        name: ptq.quantize(model, small_images, qconfig_mapping=recipe, progress=False)
        for name, recipe in quick.items()
    }


def exported(
    model: GraphModule, path: Path, images: torch.Tensor, target: str, opset: int, batch: int | None
) -> np.ndarray:
    """Export, check, open and return the logits of ONNX Runtime for all images, `batch` at a time."""
    ptq.export_onnx(model, path, images[:1], target=target, opset=opset, batch=batch)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    if target == "openvino":
        pytest.importorskip("openvino").Core().compile_model(str(path), "CPU")
    proto.opset_import[0].version = min(opset, newest_in_runtime())
    onnx.save(proto, path)
    open_session(path, exact=False, threads=1)
    session = open_session(path, threads=1)
    parts = torch.split(images, batch or len(images))
    return np.concatenate([session.run(None, {"image": part.numpy()})[0] for part in parts])


def model_for(converted: dict[str, GraphModule], target: str) -> GraphModule:
    return converted["tensorrt" if target == "tensorrt" else "ptq4vit"]


@pytest.mark.sweep
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_opset_of_a_target_computes_the_same(tmp_path, converted, small_images, target, batch):
    model = model_for(converted, target)
    with torch.inference_mode():
        simulated = model(small_images).numpy()
    newest = newest_in_runtime() if target.startswith("onnxruntime") else newest_opset()
    outputs = {
        opset: exported(model, tmp_path / f"{opset}.onnx", small_images, target, opset, batch)
        for opset in range(17, newest + 1)
    }
    np.testing.assert_allclose(outputs[18], simulated, rtol=1e-2, atol=1e-2)
    for opset, output in outputs.items():
        np.testing.assert_array_equal(output, outputs[18], err_msg=f"opset {opset}")


@pytest.mark.parametrize(
    ("target", "opset"), [("openvino", 17), ("openvino", 21), ("tensorrt", 21), ("generic", 20), ("generic", 21)]
)
def test_a_fixed_batch_runs_as_integers_too(tmp_path, converted, small_images, target, opset):
    """Where all sizes are known ONNX Runtime would make a float Gemm of a product and its bias, or an invalid node."""
    model, path = model_for(converted, target), tmp_path / "m.onnx"
    logits = exported(model, path, small_images, target, opset, 4)
    assert not runtime_graph(load_file(path)).float_products
    biases = {value.name: list(value.dims) for value in onnx.load(path).graph.initializer}
    assert biases["blocks.0.mlp.fc1.bias"] == [1, 128]
    np.testing.assert_array_equal(exported(model, path, small_images, target, 18, None), logits)
    biases = {value.name: list(value.dims) for value in onnx.load(path).graph.initializer}
    assert biases["blocks.0.mlp.fc1.bias"] == [128]


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_the_batch_may_be_fixed_when_the_file_is_opened(tmp_path, converted, small_images, target):
    path = tmp_path / "m.onnx"
    ptq.export_onnx(model_for(converted, target), path, small_images[:1], target=target, opset=21)
    options = quiet_options(1)
    options.add_free_dimension_override_by_name("batch", 1)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": small_images[:1].numpy()})[0].shape == (1, 5)


@pytest.mark.skipif(newest_in_runtime() == newest_opset(), reason="this ONNX Runtime has every opset that onnx has")
def test_what_this_runtime_cannot_open_is_refused(tmp_path, converted, small_images):
    path = tmp_path / "m.onnx"
    with pytest.raises(
        ptq.PTQError, match=r"expected a file that ONNX Runtime .* opens, got .*; use opset 20"
    ) as caught:
        ptq.export_onnx(converted["ptq4vit"], path, small_images[:1], opset=newest_opset())
    assert "report" not in str(caught.value)
    assert not path.exists()
