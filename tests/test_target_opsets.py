"""Every target at every opset and batch form: the same logits to the last bit, in the runtime that it is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from runtime_opsets import newest_in_runtime
from timm.models.vision_transformer import VisionTransformer
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.export.opsets import newest_opset
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.export.targets import TARGETS

#: None is a dynamic batch.
BATCHES = (None, 1, 4)
#: With a fixed batch ONNX Runtime adds their biases within a float Gemm up to opset 20, behind an integer product from
#: 21 on (export/gemm_biases.py): the last bit may differ between the two.
INT8_ACTIVATIONS = ("openvino", "tensorrt")


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
    gemm_until = 20 if batch and target in INT8_ACTIVATIONS else newest
    for opset, output in outputs.items():
        same = outputs[18 if opset <= gemm_until else gemm_until + 1]
        np.testing.assert_array_equal(output, same, err_msg=f"opset {opset}")


@pytest.mark.parametrize("target", INT8_ACTIVATIONS)
def test_int8_activations_open_with_a_fixed_batch_from_opset_21_on(tmp_path, converted, small_images, target):
    """Where all sizes are known ONNX Runtime makes Gemm of a product and its bias, and an invalid node of that."""
    model = model_for(converted, target)
    before = exported(model, tmp_path / "before.onnx", small_images, target, 20, 1)
    after = exported(model, tmp_path / "after.onnx", small_images, target, 21, 1)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    biases = {value.name: value.dims for value in onnx.load(tmp_path / "after.onnx").graph.initializer}
    assert biases["blocks.0.mlp.fc1.bias"] == [1, 128]


@pytest.mark.skipif(newest_in_runtime() == newest_opset(), reason="this ONNX Runtime has every opset that onnx has")
def test_what_this_runtime_cannot_open_is_refused(tmp_path, converted, small_images):
    path = tmp_path / "m.onnx"
    with pytest.raises(
        ptq.PTQError, match=r"expected a file that ONNX Runtime .* opens, got .*; use opset 20"
    ) as caught:
        ptq.export_onnx(converted["ptq4vit"], path, small_images[:1], opset=newest_opset())
    assert "report" not in str(caught.value)
    assert not path.exists()
