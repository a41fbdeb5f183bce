"""The command line: a real run on a random model, and errors as sentences."""

from __future__ import annotations

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from ptq4vit_fx.cli import app

ARGS = ["--model-arg", "img_size=32", "--model-arg", "depth=1", "--model-arg", "num_classes=3"]


@pytest.fixture
def workspace(tmp_path):
    for label in "abc":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    (tmp_path / "images" / "a" / "broken.png").write_text("not an image")
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_quantize_eval_inspect(workspace):
    out, images = workspace / "model.onnx", workspace / "images"
    weights = workspace / "weights.safetensors"
    done = run("quantize", "deit_tiny_patch16_224", "--data", images, "--out", out, "--weights", weights, *ARGS)
    assert done.exit_code == 0, done.output
    assert "broken.png" in done.output
    assert "8 products, 16 sites, W8A8, 6 images (1 skipped)" in done.output
    scored = run("eval", out, "--data", images)
    assert scored.exit_code == 0, scored.output
    assert "of 6 images, 1 skipped" in scored.output
    shown = run("inspect", out)
    assert "blocks.0.attn.matmul_av:lhs" in shown.output
    assert "twin8/softmax" in shown.output


def test_bad_input_is_one_sentence_and_leaves_nothing(workspace):
    out = workspace / "model.onnx"
    cases = [
        (["deit_tinny_patch16_224", "--data", workspace / "images"], "did you mean deit_tiny_patch16_224"),
        (["deit_tiny_patch16_224", "--data", workspace / "none", "--weights", workspace / "weights.safetensors", *ARGS],
         "no such folder"),
        (["deit_tiny_patch16_224", "--data", workspace / "images", "--weights", workspace / "weights.safetensors"],
         "expected a state dict of this model"),
        (["deit_tiny_patch16_224", "--data", workspace / "images", "--w-bits", "9"], "from 2 to 8"),
    ]  # fmt: skip
    for arguments, sentence in cases:
        result = run("quantize", *arguments, "--out", out)
        assert result.exit_code == 1
        assert sentence in result.output
        assert not out.exists()
