"""The folder of `export_huggingface`: what it holds, and that optimum and transformers.js classify with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from PIL import Image
from test_browser import native, pictures  # noqa: F401 - a fixture
from transformers import AutoConfig, AutoImageProcessor
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.export.huggingface import image_processor
from ptq4vit_fx.tools.cli import app

ROOT = Path(__file__).resolve().parents[1]
READERS = ROOT / "tests" / "readers"
OPTIMUM = ROOT / ".venv-readers" / "bin" / "python"
CONFIG = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
LABELS = ["ant", "bee", "cat", "dog", "ant"]
FILES = {"README.md", "config.json", "preprocessor_config.json", "onnx/model_quantized.onnx"}


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_converted, small_images):
    path = tmp_path_factory.mktemp("huggingface") / "new" / "small-vit"
    known: dict[str, Any] = {"preprocessing": CONFIG, "labels": LABELS, "figures": {"top-1": "12 % | of 5\nimages"}}
    report = ptq.export_huggingface(small_converted, path, small_images[:1], **known)
    assert report.path == path / "onnx" / "model_quantized.onnx"
    return path


def test_it_holds_what_readers_look_for(folder):
    assert names_in(folder) == FILES
    graph = onnx.load(folder / "onnx" / "model_quantized.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["pixel_values", "logits"]
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": 16, "patch_size": 4, "num_channels": 3}
    assert {key: config[key] for key in sizes} == sizes
    assert config["id2label"] == {str(i): name for i, name in enumerate(LABELS)}


def test_transformers_reads_its_configs(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config).__name__ == "ViTConfig"
    assert config.num_labels == 5
    assert config.id2label[2] == "cat"
    processor = AutoImageProcessor.from_pretrained(folder)
    assert tuple(processor(Image.new("RGB", (40, 30)), return_tensors="pt")["pixel_values"].shape) == (1, 3, 16, 16)


def test_its_card_has_the_figures(folder):
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers.js\npipeline_tag: image-classification\n")
    assert "| top-1 | 12 % \\| of 5 images |" in text
    assert "# small-vit" in text
    assert "{" not in text.partition("```")[0]


def test_features_are_the_last_hidden_state(tmp_path, small_images):
    torch.manual_seed(0)
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.models.VisionTransformer(**kwargs, num_classes=0, global_pool="").eval()
    converted = ptq.quantize(model, small_images, loss=lambda output: output.square().mean(), progress=False)
    ptq.export_huggingface(converted, tmp_path / "features", small_images[:1], preprocessing=CONFIG)
    graph = onnx.load(tmp_path / "features" / "onnx" / "model_quantized.onnx").graph
    assert [value.name for value in graph.output] == ["last_hidden_state"]
    config = json.loads((tmp_path / "features" / "config.json").read_text())
    assert config["architectures"] == ["ViTModel"]
    assert "id2label" not in config
    assert "image-feature-extraction" in (tmp_path / "features" / "README.md").read_text()


def test_entries_of_the_users_config_come_first(tmp_path, small_converted, small_images):
    given = {"model_type": "deit", "architectures": ["DeiTForImageClassification"]}
    options: dict[str, Any] = {"preprocessing": CONFIG, "config": given, "labels": dict(enumerate("abcde"))}
    ptq.export_huggingface(small_converted, tmp_path, small_images[:1], **options)
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "DeiTConfig"
    assert names_in(tmp_path) == FILES


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"input_size": (3, 224, 224), "crop_pct": 0.9}, ({"shortest_edge": 248}, (224, 224))),
        ({"input_size": (3, 224, 224), "crop_pct": None}, ({"shortest_edge": 256}, (224, 224))),
        ({"input_size": (3, 32, 64), "crop_mode": "squash", "crop_pct": 0.5}, ({"height": 64, "width": 128}, (32, 64))),
    ],
)
def test_the_image_processor_resizes_and_crops_as_timm(config, expected):
    found = image_processor({"mean": (0.5,), "std": (0.25,), "interpolation": "lanczos", "crop_mode": None} | config)
    assert (found["size"], tuple(found["crop_size"].values())) == expected
    assert (found["image_mean"], found["image_std"], found["resample"]) == ([0.5] * 3, [0.25] * 3, 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "preprocessing: expected that of the model, got none"),
        ({"preprocessing": CONFIG | {"crop_mode": "border"}}, "got crop_mode 'border' at 16 x 16"),
        ({"preprocessing": CONFIG, "labels": ["a"]}, "labels: expected 5 names"),
        ({"preprocessing": CONFIG, "target": "tensort"}, "did you mean tensorrt?"),
        ({"preprocessing": CONFIG, "opset": 3}, "opset: expected 17 to"),
    ],
)
def test_nothing_is_left_of_what_is_refused(tmp_path, small_converted, small_images, options, sentence):
    with pytest.raises(ptq.PTQError) as refused:
        ptq.export_huggingface(small_converted, tmp_path / "a" / "b", small_images[:1], **options)
    assert sentence in str(refused.value)
    assert not list(tmp_path.iterdir())


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


MODEL = ["deit_tiny_patch16_224", "--model-arg", "img_size=32", "--model-arg", "depth=1"]


@pytest.fixture
def workspace(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / "images" / f"{number}.png")
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("ant\nbee\ncat\n")
    weights = ["--weights", tmp_path / "weights.pth", "--model-arg", "num_classes=3"]
    return tmp_path, [*MODEL, *weights, "--data", tmp_path / "images", "--labels", tmp_path / "labels.txt"]


def test_the_command_line_writes_the_folder(workspace):
    path, arguments = workspace
    done = run("quantize", *arguments, "--out", path / "out", "--layout", "huggingface")
    assert done.exit_code == 0, done.output
    assert names_in(path / "out") == FILES
    assert json.loads((path / "out" / "config.json").read_text())["id2label"]["1"] == "bee"
    assert "| model | deit_tiny_patch16_224 |" in (path / "out" / "README.md").read_text()
    again = run("quantize", *arguments, "--out", path / "out", "--layout", "huggingface")
    assert again.exit_code == 0, again.output


def test_the_command_line_puts_the_float_file_where_readers_look_for_it(workspace):
    path, arguments = workspace
    options = ["--layout", "huggingface", "--float-onnx", path / "out" / "onnx" / "model.onnx", "--no-bench"]
    done = run("quantize", *arguments, "--out", path / "out", *options)
    assert done.exit_code == 0, done.output
    assert names_in(path / "out") == FILES | {"onnx/model.onnx"}
    for name in ("model.onnx", "model_quantized.onnx"):
        graph = onnx.load(path / "out" / "onnx" / name).graph
        assert [value.name for value in (*graph.input, *graph.output)] == ["pixel_values", "logits"]
    twice = path / "out" / "onnx" / "model_quantized.onnx"
    other = run("quantize", *arguments, "--out", path / "out", *options[:2], "--float-onnx", twice)
    assert other.exit_code == 1
    assert "--float-onnx: expected another file than --out" in other.stderr


def test_the_command_line_writes_a_file_of_bytes(workspace):
    path, arguments = workspace
    done = run("quantize", *arguments, "--out", path / "out.onnx", "--uint8-input", "nhwc")
    assert done.exit_code == 0, done.output
    assert "the file takes uint8 images: all of them exactly such" in done.output
    (entry,) = onnx.load(path / "out.onnx").graph.input
    assert entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--layout", "hugging"], "--layout: expected file or huggingface, got 'hugging'"),
        (["--uint8-input", "hwc"], "--uint8-input: expected nhwc or nchw, got 'hwc'"),
        (["--layout", "huggingface", "--uint8-input", "nhwc"], "got --layout huggingface; leave one of them out"),
        (["--layout", "huggingface", "--out", "{path}/labels.txt"], "expected a folder, got a file"),
        (["--layout", "huggingface", "--out", "{path}/none/out"], "no such folder"),
        (["--layout", "huggingface", "--float-onnx", "{path}/out/f.onnx"], "quantize --float-onnx"),
        (["--layout", "huggingface", "--float-onnx", "{path}/out/onnx/model_quantized.onnx"], "quantize --float-onnx"),
        (["--labels", "{path}/none.txt"], "--labels"),
        (["--labels", "{path}/images"], "--labels"),
        (["--labels", "{path}/two.txt"], "expected 3 lines, one per class of the model, got 2"),
        (["--labels", "{path}/images/0.png"], "expected text in UTF-8"),
    ],
)
def test_wrong_options_are_sentences(workspace, options, sentence):
    path, arguments = workspace
    (path / "two.txt").write_text("a\nb\n")
    before = names_in(path)
    done = run("quantize", *arguments, "--out", path / "out", *(option.format(path=path) for option in options))
    assert done.exit_code == 1, done.output
    assert sentence in " ".join(done.output.split())
    assert names_in(path) == before


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory, trained):
    """A trained DeiT as a folder for readers."""
    model, size = trained.load_model("deit_tiny_p8_64")
    images, _ = trained.load_images("calib", 4, size)
    mapping = ptq.recipes.ptq4vit().with_search(n=4, rounds=1)
    converted = ptq.quantize(model, images, qconfig_mapping=mapping, progress=False)
    path = tmp_path_factory.mktemp("readers") / "deit"
    config = timm.data.resolve_model_data_config(model) | {"crop_pct": 1.0}
    labels = [f"class {number}" for number in range(200)]
    ptq.export_huggingface(converted, path, images[:1], preprocessing=config, labels=labels)
    return path


def answers_of(command, **environment):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=900, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not OPTIMUM.exists(), reason="optimum-onnx is not there: `make readers` installs it")
def test_optimum_gives_the_classes_of_the_runtime(trained_folder, pictures):  # noqa: F811
    found = answers_of([OPTIMUM, READERS / "optimum_onnx.py", trained_folder, *pictures])
    expected = native(trained_folder / "onnx" / "model_quantized.onnx", pictures)
    assert [answer["class"] for answer in found] == expected
    assert [answer["label"] for answer in found] == [f"class {number}" for number in expected]


@pytest.mark.skipif(
    shutil.which("node") is None or not (READERS / "node_modules").is_dir(),
    reason="node or @huggingface/transformers is not there: `make readers` installs the package",
)
def test_transformers_js_gives_the_classes_of_the_runtime(trained_folder, pictures):  # noqa: F811
    found = answers_of(["node", READERS / "transformers_js.mjs", trained_folder, *pictures])
    expected = native(trained_folder / "onnx" / "model_quantized.onnx", pictures)
    assert [answer["class"] for answer in found] == expected
    assert [answer["label"] for answer in found] == [f"class {number}" for number in expected]
