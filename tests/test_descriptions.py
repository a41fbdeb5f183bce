"""What a file of the Python API says of itself: as much as one from the command line, for those who have it alone."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import timm
import timm.data
import torch
from PIL import Image
from rich.console import Console
from test_classify_example import run as classify

import ptq4vit_fx as ptq
from ptq4vit_fx.export.metadata import LABELS_KEY, PROVENANCE_KEY, labels_of
from ptq4vit_fx.tools.evaluation import evaluate_file
from ptq4vit_fx.tools.phases import Phases
from ptq4vit_fx.tools.shards import Question

LABELS = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture(scope="module")
def config(small_vit):
    return timm.data.resolve_model_data_config(small_vit)


def metadata_of(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("labels", [LABELS, {str(i): name for i, name in enumerate(LABELS)}, dict(enumerate(LABELS))])
def test_the_preprocessing_and_the_labels_are_in_the_file(tmp_path, small_converted, small_images, config, labels):
    path = tmp_path / "model.onnx"
    ptq.export_onnx(small_converted, path, small_images[:1], preprocessing=config, labels=labels)
    metadata = metadata_of(path)
    provenance = json.loads(metadata[PROVENANCE_KEY])
    assert provenance["seed"] == 0  # what the calibration says stays
    assert provenance["preprocessing"]["input_size"] == [3, 16, 16]  # of the file; the config's own is another
    assert config["input_size"] != (3, 16, 16)
    assert {key: tuple(provenance["preprocessing"][key]) for key in ("mean", "std")} == {
        key: tuple(config[key]) for key in ("mean", "std")
    }
    assert labels_of(metadata, "read", "model.onnx") == tuple(LABELS)


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path, small_converted, small_images):
    given = {"mean": np.array([0.5, 0.5, 0.5], np.float32), "std": torch.tensor([0.25, 0.25, 0.25])}
    ptq.export_onnx(small_converted, tmp_path / "model.onnx", small_images[:1], preprocessing=given)
    found = json.loads(metadata_of(tmp_path / "model.onnx")[PROVENANCE_KEY])["preprocessing"]
    assert (found["mean"], found["std"]) == ([0.5] * 3, [0.25] * 3)


def test_it_is_evaluated_and_deployed_without_more(tmp_path, small_converted, small_images, config):
    """What `eval` refused of every file of the API: expected a file that records its preprocessing."""
    path = tmp_path / "model.onnx"
    known = {"preprocessing": config, "labels": LABELS, "target": "onnxruntime-avx2"}
    ptq.export_onnx(small_converted, path, small_images[:1], **known)
    for number in range(5):
        (tmp_path / "images" / f"{number}").mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}" / "a.png")
    assert evaluate_file(Question(path, tmp_path / "images", batch_size=2), Phases(Console(quiet=True))).images == 5
    done = classify(path, tmp_path / "images")
    assert done.returncode == 0, done.stderr
    assert {line.split()[-1] for line in done.stdout.splitlines()[1:]} <= set(LABELS)
    others = tmp_path / "labels.txt"
    others.write_text("\n".join("vwxyz"))
    told = classify(path, tmp_path / "images", "--labels", others)
    assert {line.split()[-1] for line in told.stdout.splitlines()[1:]} <= set("vwxyz")


def test_without_them_nothing_is_said(tmp_path, small_converted, small_images):
    ptq.export_onnx(small_converted, tmp_path / "model.onnx", small_images[:1])
    metadata = metadata_of(tmp_path / "model.onnx")
    assert LABELS_KEY not in metadata
    assert "preprocessing" not in json.loads(metadata[PROVENANCE_KEY])
    assert labels_of(metadata, "read", "model.onnx") == ()


def test_the_batch_is_called_batch_everywhere(tmp_path, small_converted, small_images):
    ptq.export_onnx(small_converted, tmp_path / "model.onnx", small_images[:1], input_names=["x"], output_names=["y"])
    graph = onnx.load(tmp_path / "model.onnx").graph
    ends = {value.name: value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)}
    assert ends == {"x": "batch", "y": "batch"}
    symbols = {dim.dim_param for value in graph.value_info for dim in value.type.tensor_type.shape.dim}
    assert all("batch" in symbol for symbol in symbols if symbol), symbols


@pytest.mark.parametrize("text", ["1", '{"0": "a"}', "[1]", "not json"])
def test_labels_that_are_none_are_refused(text):
    with pytest.raises(ptq.PTQError, match=r"file\.onnx: ptq4vit_fx\.labels"):
        labels_of({LABELS_KEY: text}, "read", "file.onnx")
