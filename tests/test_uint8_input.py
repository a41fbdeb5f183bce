"""Files that take uint8 images: the same codes and the same logits as floats of the preprocessing, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from rich.console import Console
from scripts import load_script
from sklearn.datasets import load_sample_images
from test_classify_example import CONFIG, SCRIPT
from test_classify_example import run as classify
from torchvision import transforms

import ptq4vit_fx as ptq
from ptq4vit_fx.export.metadata import UINT8_KEY
from ptq4vit_fx.export.nodes import QUANTIZE, name_of
from ptq4vit_fx.export.pixels import LAYOUTS, Pixels
from ptq4vit_fx.export.proof.inspection import inspect_file
from ptq4vit_fx.export.proof.layers import add_outputs
from ptq4vit_fx.export.proof.runtime import exact_here, open_model, open_session
from ptq4vit_fx.tools.evaluation import evaluate_file
from ptq4vit_fx.tools.phases import Phases
from ptq4vit_fx.tools.shards import Question

MEAN, STD = CONFIG["mean"], CONFIG["std"]
LABELS = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture(scope="module")
def photos():
    """Pieces of two photographs, (48, 16, 16, 3) uint8."""
    pieces = [
        image[y : y + 16, x : x + 16] for image in load_sample_images().images for y, x in zip(*corners(), strict=True)
    ]
    return np.stack(pieces)


def corners():
    random = np.random.default_rng(0)
    return random.integers(0, 400, 24), random.integers(0, 600, 24)


@pytest.fixture(scope="module")
def pixels(photos):
    """What a model is given of the photographs: torchvision's own floats, (48, 3, 16, 16)."""
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return torch.stack([prepare(Image.fromarray(photo)) for photo in photos])


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_converted, small_images):
    """Name -> a file of the small model: floats, and uint8 in both layouts."""
    folder = tmp_path_factory.mktemp("uint8")
    for name in ("float", *LAYOUTS):
        known: dict[str, Any] = {"preprocessing": CONFIG, "labels": LABELS, "target": "onnxruntime-avx2"}
        known |= {} if name == "float" else {"uint8_input": name}
        ptq.export_onnx(small_converted, folder / f"{name}.onnx", small_images[:1], **known)
    return {name: folder / f"{name}.onnx" for name in ("float", *LAYOUTS)}


def in_layout(photos, layout):
    return photos if layout == "nhwc" else np.ascontiguousarray(photos.transpose(0, 3, 1, 2))


def codes_and_logits(path, images):
    """Return the codes of every quantizer of activations, by name, and the logits."""
    model = exact_here(ir.load(path))
    names = [name_of(node.outputs[0]) for node in model.graph if node.op_type == QUANTIZE]
    add_outputs(model, tuple(names))
    logits, *codes = open_model(model).run(None, {"image": images})
    return dict(zip(names, codes, strict=True)), logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_codes_and_logits_bit_for_bit(files, photos, pixels, layout):
    codes, logits = codes_and_logits(files["float"], pixels.numpy())
    mine, same = codes_and_logits(files[layout], in_layout(photos, layout))
    assert len(codes) > 10
    assert list(mine) == list(codes)
    for name in codes:
        np.testing.assert_array_equal(mine[name], codes[name], err_msg=name)
    np.testing.assert_array_equal(same, logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_floats_inside_of_the_file_are_torchvisions_for_every_byte(files, layout):
    """Codes forgive a last bit, unless a value lies between two of them: the floats themselves do not."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    model = ir.load(files[layout])
    (last,) = (node for node in model.graph if [name_of(value) for value in node.inputs][1:] == ["image_std"])
    add_outputs(model, (name_of(last.outputs[0]),))
    floats = open_model(model).run(None, {"image": in_layout(ramp[None], layout)})[-1]
    expected = transforms.Normalize(MEAN, STD)(transforms.ToTensor()(Image.fromarray(ramp)))
    np.testing.assert_array_equal(floats[0], expected.numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_says_what_it_takes(files, layout):
    (entry,) = open_session(files[layout]).get_inputs()
    shape = ["batch", 16, 16, 3] if layout == "nhwc" else ["batch", 3, 16, 16]
    assert (entry.name, entry.type, entry.shape) == ("image", "tensor(uint8)", shape)
    metadata = {item.key: item.value for item in onnx.load(files[layout]).metadata_props}
    assert metadata[UINT8_KEY] == layout
    onnx.checker.check_model(str(files[layout]), full_check=True)
    mine, theirs = inspect_file(files[layout]), inspect_file(files["float"])
    assert mine.sites == theirs.sites
    assert len(mine.sites) > 10


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.5,) * 3, (0.5,) * 3)])
def test_every_value_of_a_byte_is_torchvisions(mean, std):
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    expected = transforms.Normalize(mean, std)(transforms.ToTensor()(Image.fromarray(ramp)))
    found = Pixels(mean, std, "nhwc").values(ramp[None])[0]
    assert torch.equal(found, expected)
    assert np.array_equal(Pixels(mean, std, "nhwc").pixels(expected[None])[0], ramp)
    scaled = torch.from_numpy(ramp).float()[..., 0] * np.float32(1 / (255 * std[0])) + np.float32(-mean[0] / std[0])
    assert not torch.equal(scaled, expected[0])  # why the order of the operations is kept


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_gives_both_sides_the_same_images(files, small_converted, pixels, layout):
    report = ptq.verify_onnx(files[layout], small_converted, pixels[:12], layers=4)
    assert report.rounded == 0
    assert report.same_functions.bit_equal == 1.0
    assert len(report.layers) > 10
    assert report.first_divergence is None
    assert "uint8 images: all of them exactly such" in str(report)
    moved = pixels[:4].clone()
    moved[1] += 1e-3
    rounded = ptq.verify_onnx(files[layout], small_converted, moved, layers=2)
    assert rounded.rounded == 1
    assert rounded.same_functions.bit_equal == 1.0
    assert "1 of them rounded to uint8 on both sides" in str(rounded)
    assert ptq.verify_onnx(files["float"], small_converted, moved, layers=0).rounded is None


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "generic"])
def test_with_other_targets_opsets_and_a_fixed_batch(tmp_path, small_converted, pixels, target):
    path = tmp_path / "model.onnx"
    options = {"target": target, "opset": 17, "batch": 4, "uint8_input": "nhwc", "input_names": ["pixels"]}
    report = ptq.export_onnx(small_converted, path, pixels[:1], preprocessing={"mean": MEAN, "std": STD}, **options)
    assert str(report.rewrites[-1]) == "take_uint8: 1 rewritten"
    verified = ptq.verify_onnx(path, small_converted, pixels[:6], layers=0)
    assert verified.same_functions.bit_equal == 1.0


def test_scores_and_scripts_read_it(tmp_path, files, photos):
    for number, photo in enumerate(photos[:10]):
        folder = tmp_path / "images" / str(number % 5)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).resize((20 + number, 24)).save(folder / f"{number}.png")
    scores = {
        evaluate_file(Question(path, tmp_path / "images"), Phases(Console(quiet=True))) for path in files.values()
    }
    assert len(scores) == 1
    assert scores.pop().images == 10
    found = {classify(path, tmp_path / "images").stdout for path in files.values()}
    assert len(found) == 1
    assert found.pop().splitlines()[1].split()[-1] in LABELS
    script = load_script(SCRIPT)
    assert script.UINT8 == UINT8_KEY


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"uint8_input": "hwc", "preprocessing": CONFIG}, "uint8_input: expected nhwc or nchw, got 'hwc'"),
        ({"uint8_input": "nhwc"}, "expected mean and std of the preprocessing, got none"),
        ({"preprocessing": {"mean": (0.5,), "std": (0.0,)}}, "preprocessing: std: expected positive numbers"),
        ({"preprocessing": {"mean": (0.5,)}}, "expected a field std, got none"),
        ({"preprocessing": {"mean": MEAN, "std": STD, "crop": 1}}, "expected fields that this version knows, got crop"),
        ({"preprocessing": {"mean": MEAN, "std": object()}}, "expected numbers and names"),
        ({"preprocessing": "imagenet"}, "expected a mapping with mean and std, got str"),
        ({"labels": ["ant"]}, "labels: expected 5 names, one per class of the model, got 1"),
        ({"labels": [1, 2, 3, 4, 5]}, "labels: [0]: expected text, got 1"),
        ({"labels": "abcde"}, "labels: expected a list, got 'abcde'"),
        ({"labels": {0: "a", 2: "b"}}, "expected 5 names, one per class of the model, got 1"),
    ],
)
def test_what_is_refused(tmp_path, small_converted, small_images, options, sentence):
    with pytest.raises(ptq.PTQError) as refused:
        ptq.export_onnx(small_converted, tmp_path / "model.onnx", small_images[:1], **options)
    assert sentence in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_model_of_other_inputs_gets_a_sentence(files):
    """The file of a model of images, given a model of two inputs, and one of another number of channels."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 5)

        def forward(self, x, y):
            return self.head(x + y)

    two = (torch.randn(4, 8), torch.randn(4, 8))
    converted = ptq.quantize(Two().eval(), [two], example_inputs=two, progress=False)
    with pytest.raises(ptq.PTQError, match="verify_onnx"):
        ptq.verify_onnx(files["nhwc"], converted, [two])
    gray = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 5)).eval()
    images = torch.randn(4, 1, 16, 16)
    with pytest.raises(ptq.PTQError, match="verify_onnx"):
        ptq.verify_onnx(files["nchw"], ptq.quantize(gray, images, progress=False), images)


@pytest.mark.parametrize("layout", ["hwcn", ""])
def test_a_file_that_says_another_layout_is_refused(tmp_path, files, small_converted, pixels, layout):
    model = onnx.load(files["nhwc"])
    next(item for item in model.metadata_props if item.key == UINT8_KEY).value = layout
    onnx.save(model, tmp_path / "forged.onnx")
    with pytest.raises(ptq.PTQError, match="uint8_input: expected nhwc or nchw"):
        ptq.verify_onnx(tmp_path / "forged.onnx", small_converted, pixels[:2])
