"""Models by name through the command line: what a file says of them, and eval beside them."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ptq4vit_fx.tools.cli import app

SIZES = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FAST = ["--images", 16, "--recipe", "base", "--no-bench"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 20 images of two colours, and two of a third alone, as the working directory."""
    folder = tmp_path_factory.mktemp("named")
    for number in range(20):
        (folder / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 60, (40, 40, 3), np.uint8)
        pixels[..., number % 2] += 190
        Image.fromarray(pixels).save(folder / "images" / "ab"[number % 2] / f"{number}.png")
    (folder / "images" / "c").mkdir()
    Image.new("RGB", (40, 40), (0, 0, 250)).save(folder / "images" / "c" / "0.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def facts(file):
    return {entry.key.rpartition(".")[2]: entry.value for entry in onnx.load(file).metadata_props}


def test_a_folder_of_transformers(place):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, intermediate_size=64, id2label={0: "red", 1: "green", 2: "blue"})
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("vit")
    shown = run("quantize", "./vit", "--data", "images", "--out", "vit.onnx", *FAST)
    assert "same class on " in shown.stdout
    assert json.loads(facts("vit.onnx")["labels"]) == ["red", "green", "blue"]
    said = json.loads(facts("vit.onnx")["provenance"])
    assert (said["model"], said["loss"]) == ("./vit", "pseudo_label")
    assert said["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    found = json.loads(run("eval", "vit.onnx", "--data", "images", "--against", "./vit", "--json").stdout)
    assert (found["images"], found["pair"]["same"]["of"], found["kind"]) == (21, 21, "classes")


def test_an_embedding_of_transformers(place):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)).save_pretrained("dino")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("dino")
    shown = run("quantize", "./dino", "--data", "images", "--out", "dino.onnx", *FAST)
    assert "recall@1 " in shown.stdout
    assert json.loads(facts("dino.onnx")["provenance"])["loss"] == "projection"
    found = run("eval", "dino.onnx", "--data", "images", "--against", "./dino").stdout
    assert "of 20 images, 0 skipped: the nearest other is of its class" in found
    assert "images alone in their class, which do not count: 1" in found
    assert re.search(r"mean cosine of the embedding to float's (0\.99|1\.00)", found)


def test_an_embedding_of_timm(place):
    sizes = [part for size in ("img_size=32", "depth=1", "num_classes=0") for part in ("--model-arg", size)]
    torch.manual_seed(0)
    import timm

    torch.save(timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).state_dict(), "w.pth")
    given = ["deit_tiny_patch16_224", "--weights", "w.pth", *sizes]
    shown = run("quantize", *given, "--data", "images", "--out", "t.onnx", "--float-onnx", "f.onnx", *FAST)
    assert "weights: left out: head.weight, head.bias" in shown.stdout
    said = json.loads(facts("t.onnx")["provenance"])
    assert (said["output"], said["model_args"], said["weights"]) == ("embeddings", sizes[1::2], "w.pth")
    found = json.loads(run("eval", "t.onnx", "--data", "images", "--against", "f.onnx", "--json").stdout)
    assert (found["kind"], found["images"], found["alone"]) == ("embeddings", 20, 1)
    assert found["cosine"] > 0.99
    assert found["score"]["top1"]["of"] == 20


def test_another_size_of_what_takes_any(place):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)).save_pretrained("any")
    transformers.ViTModel(transformers.ViTConfig(**SIZES)).save_pretrained("one")
    for folder in ("any", "one"):
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    line = ["--data", "images", "--out", "any.onnx", "--img-size", "48x64", *FAST]
    run("quantize", "./any", *line)
    assert [side.dim_value for side in onnx.load("any.onnx").graph.input[0].type.tensor_type.shape.dim[2:]] == [48, 64]
    assert json.loads(facts("any.onnx")["provenance"])["preprocessing"]["input_size"] == [3, 48, 64]
    refused = CliRunner().invoke(app, [str(part) for part in ("quantize", "./one", *line)])
    assert refused.exit_code == 1
    assert "--img-size 48x64: expected a size that the model takes, got " in refused.stderr.replace("\n", " ")
