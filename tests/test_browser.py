"""The page of examples/browser: Pillow's pixels in JavaScript, and in Chromium the classes of native ONNX Runtime."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm.data
import torch
from PIL import Image

import ptq4vit_fx as ptq
from ptq4vit_fx.export.proof.runtime import open_session

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "examples" / "browser"
NODE = shutil.which("node")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
CONFIG = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic", "crop_pct": 0.9}
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_browser = pytest.mark.skipif(
    NODE is None or CHROMIUM is None or not (PAGE / "node_modules").is_dir(),
    reason="chromium or the npm packages of examples/browser are not there: `make browser` installs them",
)


def node(program, given, **options):
    """Run a program of a module in examples/browser on JSON; return what it prints."""
    command = [NODE, "--input-type=module", "-e", program]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, cwd=PAGE, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FIT = """
import { readFileSync } from "node:fs";
import { bytes, fit, normalized } from "./images.js";
const cases = JSON.parse(readFileSync(0, "utf-8"));
console.log(JSON.stringify(cases.map(({ width, height, data, config, size }) => {
  const image = fit({ width, height, data: Uint8Array.from(data) }, config, size);
  const list = (values) => Array.from(values);
  const [nhwc, nchw] = ["nhwc", "nchw"].map((layout) => list(bytes(image, layout)));
  return { values: list(normalized(image, config)), nhwc, nchw };
})));
"""


@pytest.fixture
def horizontal_first(monkeypatch):
    """Let Pillow resize along the rows first, as the page does: Pillow 13 takes the other order for some sizes."""
    resize = Image.Image.resize

    def in_two(image, size, resample=None, *more, **others):
        return resize(resize(image, (size[0], image.size[1]), resample), size, resample, *more, **others)

    monkeypatch.setattr(Image.Image, "resize", in_two)


@needs_node
@pytest.mark.usefixtures("horizontal_first")
def test_its_pixels_are_those_of_timm():
    random, cases, expected = np.random.default_rng(0), [], []
    modes = [
        *itertools.product(["center", "squash", "border"], [0.875, 1.0], ["bicubic"], [(16, 16)]),
        *itertools.product(["center"], [0.9], ["bilinear", "nearest", "box", "hamming", "lanczos"], [(16, 16)]),
        # timm before 1.0.31 resizes to other sizes than squares by "bilinear", whatever it is asked for.
        *itertools.product(["center", "squash", "border"], [0.9], ["bilinear"], [(12, 20)]),
    ]
    for mode, crop_pct, interpolation, size in modes:
        config = CONFIG | {"crop_mode": mode, "crop_pct": crop_pct, "interpolation": interpolation}
        transform = timm.data.create_transform(**config, input_size=(3, *size))
        for shape in ((40, 40), (23, 51), (64, 17), (9, 12), (16, 16)):
            image = random.integers(0, 256, (*shape, 3), np.uint8)
            given = {"width": shape[1], "height": shape[0], "data": image.reshape(-1).tolist()}
            cases.append(given | {"config": config, "size": size})
            expected.append((interpolation, mode, shape, transform(Image.fromarray(image)).numpy()))
    for case, found, (*what, pixels) in zip(cases, node(FIT, cases), expected, strict=True):
        height, width = case["size"]
        values = np.array(found["values"], np.float32).reshape(3, height, width)
        np.testing.assert_array_equal(values, pixels, err_msg=str(what))
        planes = np.array(found["nhwc"]).reshape(height, width, 3).transpose(2, 0, 1)
        np.testing.assert_array_equal(planes, np.array(found["nchw"]).reshape(3, height, width))


READ = """
import { readFileSync } from "node:fs";
import { readMetadata } from "./metadata.js";
const answer = (path) => { try { return readMetadata(readFileSync(path)); } catch (error) { return error.message; } };
console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf-8")).map(answer)));
"""


@needs_node
def test_its_metadata_are_those_of_the_file(tmp_path, small_converted, small_images):
    path, cut, text = (tmp_path / name for name in ("model.onnx", "cut.onnx", "text.onnx"))
    ptq.export_onnx(small_converted, path, small_images[:1], preprocessing=CONFIG, labels=list("abcdé"))
    cut.write_bytes(path.read_bytes()[:5000])
    text.write_text("a text, which is no model")
    whole, *broken = node(READ, [str(path), str(cut), str(text)])
    assert whole == {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert "é" in json.loads(whole["ptq4vit_fx.labels"])
    assert all(str(answer).startswith("this is no ONNX file") for answer in broken), broken


def test_the_page_names_what_is_there():
    """Every module that it imports lies beside it, and the version of npm's package is a fixed one."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir() if path.is_file()}
    imported = {name for text in sources.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert imported == {"images.js", "metadata.js"} & set(sources)
    packages = json.loads(sources["package.json"])
    for version in (*packages["dependencies"].values(), *packages["devDependencies"].values()):
        assert re.fullmatch(r"[\d.]+", version)
    assert "node_modules/onnxruntime-web/dist/ort.wasm.min.mjs" in sources["index.html"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, trained):
    """Eight photographs as PNG files, their classes' number behind their own; labels are not needed."""
    folder = tmp_path_factory.mktemp("pictures")
    images, _ = trained.load_images("val", 8, 64)
    mean, std = (torch.tensor(CONFIG[key]).view(3, 1, 1) for key in ("mean", "std"))
    for number, image in enumerate(images):
        pixels = ((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def deit(tmp_path_factory, trained):
    """A folder with `model.onnx`, `float.onnx` and the labels of a trained DeiT; and its preprocessing."""
    folder = tmp_path_factory.mktemp("deit")
    model, size = trained.load_model("deit_tiny_p8_64")
    images, _ = trained.load_images("calib", 4, size)
    mapping = ptq.recipes.ptq4vit(twins="uniform").with_search(n=4, rounds=1)
    converted = ptq.quantize(model, images, qconfig_mapping=mapping, progress=False)
    known: dict[str, Any] = {"preprocessing": CONFIG | {"crop_pct": 1.0}, "labels": [f"class {i}" for i in range(200)]}
    ptq.export_onnx(converted, folder / "model.onnx", images[:1], **known)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(model, (images[:2],), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(folder / "float.onnx")
    return folder


def native(path, pictures):
    session = open_session(path, exact=False)
    transform = timm.data.create_transform(**(CONFIG | {"crop_pct": 1.0}), input_size=(3, 64, 64))
    (entry,) = session.get_inputs()
    pixels = [transform(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))[None].numpy() for path in pictures]
    return [int(session.run(None, {entry.name: image})[0].argmax()) for image in pixels]


@needs_browser
def test_chromium_shows_the_classes_of_native(deit, pictures):
    script = ROOT / "tests" / "readers" / "chromium.mjs"
    command = list(map(str, [NODE, script, PAGE, deit, CHROMIUM, *pictures]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["problems"] == []
    for kind, name in (("float", "float.onnx"), ("int8", "model.onnx")):
        assert [int(answer[kind]["class"]) for answer in shown["answers"]] == native(deit / name, pictures)
        assert all(float(answer[kind]["milliseconds"]) > 0 for answer in shown["answers"])
    for answer in shown["answers"]:
        print(answer["state"])  # the ratio, for docs/browser.md: pytest -s
        assert re.fullmatch(r"int8 takes [\d.]+ times less", answer["state"])
        assert f"class {answer['int8']['class']}\t" in answer["int8"]["text"]
