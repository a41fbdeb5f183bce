"""The deployment script: alone with ONNX Runtime, numpy and pillow, and the same classes as `ptq4vit eval`."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm.data
import torch
from PIL import Image
from scripts import load_script

import ptq4vit_fx as ptq
from ptq4vit_fx.data.folders import list_images
from ptq4vit_fx.data.reading import read_images
from ptq4vit_fx.export.metadata import PROVENANCE_KEY
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.tools.file_images import preprocessing_of_file

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "classify_onnxruntime.py"
CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.9,
    "crop_mode": "center",
}
#: What a deployment does not have installed.
BLOCKED = ("torch", "torchvision", "timm", "ptq4vit_fx", "onnx", "onnxscript", "rich", "typer")


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of many shapes, smooth enough that interpolation matters, and one that is none."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, size in enumerate([(40, 40), (23, 51), (64, 17), (16, 16), (9, 12), (18, 17)]):
        small = Image.fromarray(random.integers(0, 255, (5, 5, 3), np.uint8))
        (folder / f"{number % 2}").mkdir(exist_ok=True)
        small.resize(size, Image.Resampling.BILINEAR).save(folder / f"{number % 2}" / f"{number}.png")
    Image.fromarray(random.integers(0, 255, (20, 30), np.uint8)).save(folder / "grey.png")
    (folder / "broken.png").write_text("not an image")
    deep = np.kron(random.integers(0, 65536, (4, 5)), np.ones((6, 6))).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB").save(folder / "photo.jpg", exif=exif)
    (folder / ".hidden").mkdir()
    Image.fromarray(deep).save(folder / ".hidden" / "hidden.png")
    return folder


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, small_vit, small_images):
    """A file for any CPU: with uint8 weights no kernel saturates."""
    mapping = ptq.recipes.ptq4vit().with_search(n=4, rounds=1)
    prepared = ptq.prepare_fx(small_vit, mapping, small_images[:1])
    calibration = ptq.calibrate(prepared, small_images[:4], progress=False)
    calibration = replace(calibration, provenance=calibration.provenance | {"preprocessing": CONFIG})
    ptq.load_calibration(prepared, calibration)
    path = tmp_path_factory.mktemp("deployed") / "model.onnx"
    ptq.export_onnx(ptq.convert_fx(prepared), path, small_images[:1], target="onnxruntime-avx2")
    return path


def run(*arguments):
    """Run the script in a Python in which the blocked packages cannot be imported."""
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({BLOCKED!r})); "
        f"sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, SCRIPT, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)


def test_it_gives_the_classes_of_eval(tmp_path, deployed, photos):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(["ant", "bee", "cat", "dog", "elk"]))
    done = run(deployed, photos, "--labels", labels, "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stderr
    assert "broken.png" in done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["path", "class", "probability", "label"]
    session = open_session(deployed)
    transform = timm.data.create_transform(**preprocessing_of_file(session, deployed, None))
    paths = list_images(photos).items
    expected = []
    for number, pixels in read_images(paths, transform, []):
        scores = torch.from_numpy(session.run(None, {"image": pixels[None].numpy()})[0]).softmax(1)[0]
        best = int(scores.argmax())
        label = ["ant", "bee", "cat", "dog", "elk"][best]
        expected.append([str(paths[number].relative_to(photos)), str(best), f"{scores[best]:.4f}", label])
    assert len(expected) == 9
    assert [line.split() for line in lines] == expected


def test_a_fixed_batch_is_filled_up(tmp_path, deployed, photos):
    model = onnx.load(deployed)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "fixed.onnx")
    fixed, dynamic = run(tmp_path / "fixed.onnx", photos), run(deployed, photos)
    assert fixed.returncode == 0, fixed.stderr
    assert fixed.stdout == dynamic.stdout


@pytest.mark.parametrize(
    ("mode", "crop_pct", "interpolation", "size"),
    [
        *itertools.product(["center", "squash", "border"], [0.875, 1.0, 0.6], ["bicubic"], [(16, 16)]),
        *itertools.product(["center", "squash", "border"], [0.9], ["bilinear"], [(12, 20)]),
    ],
)
def test_its_pixels_are_those_of_timm(script, photos, mode, crop_pct, interpolation, size):
    config = CONFIG | {"crop_mode": mode, "crop_pct": crop_pct, "interpolation": interpolation}
    config |= {"input_size": (3, *size)}
    transform = timm.data.create_transform(**config)
    for path in sorted(photos.rglob("[0-9g]*.png")):
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        np.testing.assert_array_equal(script.preprocess(rgb, config), transform(rgb).numpy(), err_msg=path.name)


def test_errors_are_sentences(tmp_path, deployed, photos):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.onnx").write_text("no")
    (tmp_path / "two.txt").write_text("a\nb\n")
    bare = onnx.load(deployed)
    kept = [entry for entry in bare.metadata_props if entry.key != PROVENANCE_KEY]
    del bare.metadata_props[:]
    bare.metadata_props.extend(kept)
    onnx.save(bare, tmp_path / "bare.onnx")
    for arguments, sentence in {
        (tmp_path / "none.onnx", photos): "expected an ONNX file, got no such file",
        (tmp_path / "text.onnx", photos): "expected a model that ONNX Runtime can open",
        (tmp_path / "bare.onnx", photos): "expected a file that records its preprocessing",
        (deployed, tmp_path / "none"): "expected a folder of images, got no such folder",
        (deployed, tmp_path / "empty"): "expected one image or more, got none",
        (deployed, photos, "--labels", tmp_path / "two.txt"): "expected 5 lines, one per class of the model, got 2",
    }.items():
        done = run(*arguments)
        assert done.returncode == 1
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_it_warns_of_cpus_without_vnni(script, tmp_path, deployed, monkeypatch, capsys):
    model = onnx.load(deployed)
    next(entry for entry in model.metadata_props if entry.key == script.TARGET).value = "onnxruntime"
    onnx.save(model, tmp_path / "signed.onnx")
    for lacks, path, warned in ((True, "signed", True), (False, "signed", False), (True, "avx2", False)):
        monkeypatch.setattr(script, "lacks_vnni", lambda answer=lacks: answer)
        script.open_model(deployed if path == "avx2" else tmp_path / "signed.onnx", 1)
        assert ("no VNNI" in capsys.readouterr().err) == warned


def test_it_reads_the_keys_that_export_writes(script, deployed):
    keys = {entry.key for entry in onnx.load(deployed).metadata_props}
    assert {script.PROVENANCE, script.TARGET} <= keys


def test_progress_is_shown_after_two_seconds(script, deployed, photos, monkeypatch, capsys):
    clock = itertools.count(0, 3)
    monkeypatch.setattr(script.time, "monotonic", lambda: next(clock))
    arguments = argparse.Namespace(model=deployed, images=photos, labels=None, batch_size=3, threads=1)
    script.classify(arguments)
    assert "3 of 10 images, " in capsys.readouterr().err
