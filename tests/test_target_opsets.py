"""Every target at every opset: the same logits to the last bit, and nothing but standard operators of that opset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.export.opsets import newest_opset
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.export.targets import TARGETS

pytestmark = pytest.mark.sweep

#: ONNX Runtime 1.32 has no QuantizeLinear of opset 28; the checker of onnx 1.23 has.
NEWEST_IN_RUNTIME = 27


@pytest.fixture(scope="module")
def converted(small_vit, small_images) -> dict[str, GraphModule]:
    """Recipe -> converted model; what TensorRT takes has no twin behind softmax."""
    recipes = {"ptq4vit": ptq.recipes.ptq4vit(), "tensorrt": ptq.recipes.tensorrt()}
    quick = {name: recipe.with_search(n=8, rounds=1) for name, recipe in recipes.items()}
    return {
        name: ptq.quantize(small_vit, small_images, qconfig_mapping=recipe, progress=False)
        for name, recipe in quick.items()
    }


def exported(model: GraphModule, path: Path, images: torch.Tensor, target: str, opset: int) -> np.ndarray:
    """Export, check, and return the logits of ONNX Runtime."""
    ptq.export_onnx(model, path, images[:1], target=target, opset=opset)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    proto.opset_import[0].version = min(opset, NEWEST_IN_RUNTIME)
    onnx.save(proto, path)
    return open_session(path, threads=1).run(None, {"image": images.numpy()})[0]


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_opset_of_a_target_computes_the_same(tmp_path, converted, small_images, target):
    model = converted["tensorrt" if target == "tensorrt" else "ptq4vit"]
    with torch.inference_mode():
        simulated = model(small_images).numpy()
    outputs = {
        opset: exported(model, tmp_path / f"{opset}.onnx", small_images, target, opset)
        for opset in range(17, newest_opset() + 1)
    }
    np.testing.assert_allclose(outputs[18], simulated, rtol=1e-2, atol=1e-2)
    for opset, output in outputs.items():
        np.testing.assert_array_equal(output, outputs[18], err_msg=f"opset {opset}")
