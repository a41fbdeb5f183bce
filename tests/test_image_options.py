"""How pictures become pixels, on the command line: what is asked for is calibrated, recorded, and evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scripts import load_script
from test_data import tiff
from typer.testing import CliRunner

from ptq4vit_fx.data.image_files import opened
from ptq4vit_fx.errors import PTQError
from ptq4vit_fx.export.metadata import PROVENANCE_KEY
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.inputs.sizes import bytes_of
from ptq4vit_fx.tools.cli import app
from ptq4vit_fx.tools.file_images import preprocessing_of_file
from ptq4vit_fx.tools.image_options import ImageOptions, image_options
from ptq4vit_fx.tools.models import parse_arguments
from ptq4vit_fx.tools.named.kinds import load_model
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tools.remade import Named, float_network, network_of, of_file
from ptq4vit_fx.tools.request import batch_of_calibration, gibibytes


@pytest.fixture
def untrained(monkeypatch):
    """Models without the hub."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **arguments: create(name, **arguments))
    return lambda name, arguments: Asked(name, arguments=tuple(arguments))


#: Models whose size is in their first layer, in themselves, nowhere, and that have none; with small ones of each.
SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 1},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 12},
    "maxvit_pico_rw_256": {},
    "levit_128s": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_that_is_asked_for_is_the_size_of_the_pixels(untrained, name):
    arguments = [f"{key}={value}" for key, value in SIZES[name].items()]
    asked = image_options("quantize", "128")
    named = asked.build(untrained(name, arguments))
    config = asked.applied(named.preprocessing, arguments)
    assert config["input_size"] == (3, 128, 128)
    asked.check_taken(named.network, config["input_size"])
    with torch.no_grad():
        assert named.network(torch.zeros(1, *config["input_size"])).shape == (1, 1000)
    if name != "convnext_atto":  # by --model-arg, of which the model need not say anything
        arguments.append("img_size=128")
        config = ImageOptions().applied(load_model(untrained(name, arguments)).preprocessing, arguments)
        assert config["input_size"] == (3, 128, 128)


def test_other_sizes_than_squares(untrained):
    asked = image_options("quantize", "64x96")
    model = asked.build(untrained("vit_tiny_patch16_224", ["depth=1"]))
    assert asked.applied(model.preprocessing)["input_size"] == (3, 64, 96)
    assert asked == image_options("quantize", "64,96")
    again = asked.build(untrained("vit_tiny_patch16_224", ["depth=1", "img_size=(64, 96)"]))
    assert again.network.patch_embed.img_size == (64, 96)
    with pytest.raises(PTQError, match="expected a model with its weights"):  # of another cause than its size
        asked.build(untrained("vit_tiny_patch16_224", ["nonsense=1"]))


def test_numbers_for_every_channel():
    config = {"input_size": (3, 8, 8), "mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3, "crop_pct": 0.9}
    found = image_options("quantize", None, "0.5", "0.1, 0.2 0.3", 1.0, "nearest").applied(config)
    assert (found["mean"], found["std"]) == ((0.5,) * 3, (0.1, 0.2, 0.3))
    assert (found["crop_pct"], found["interpolation"], found["input_size"]) == (1.0, "nearest", (3, 8, 8))
    gray = image_options("quantize", None, "0.4,0.5,0.6").applied(config | {"input_size": (1, 8, 8)})
    assert (gray["mean"], gray["std"]) == ((0.5,), (0.5,))
    assert parse_arguments(["img_size=(8, 16)"]) == {"img_size": (8, 16)}


def test_memory_is_bytes_or_text_with_a_unit():
    sizes = {"8GiB": 2**33, "500 MiB": 500 * 2**20, "1.5kB": 1500, "2gb": 2 * 10**9, "7": 7, 7: 7}
    for text, size in sizes.items():
        assert bytes_of(text, "calibrate", "memory_limit") == size
    for wrong in ("", "0GiB", "-1GiB", "8 parsecs", "1e3", "GiB", 0, -1, True, 1.5, "9" * 400):
        with pytest.raises(PTQError, match="calibrate: memory_limit: expected bytes above 0, or text with a unit"):
            bytes_of(wrong, "calibrate", "memory_limit")
    assert gibibytes("8") == gibibytes("8GiB") == 2**33
    assert gibibytes("0.5") == 2**29
    assert gibibytes(None) is None


def test_the_old_name_of_the_calibration_batch_says_what_it_is():
    assert batch_of_calibration(8, None) == 8
    with pytest.warns(UserWarning, match=r"read as --calibration-batch 4, .* alone is --file-batch 4"):
        assert batch_of_calibration(8, 4) == 4


def test_all_of_it_is_in_the_file_and_eval_goes_by_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), **sizes).state_dict(), "w.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 50, 3), np.uint8)
    np.savez("photos.npz", images=pixels, labels=np.arange(40) % 3)
    options = "--mean 0.4,0.5,0.6 --std 0.25 --crop-pct 1 --interpolation bilinear --img-size 32x48"
    model = ["vit_tiny_patch16_224", "--weights", "w.safetensors", "--recipe", "base", "--no-bench", *options.split()]
    model += [part for key, value in sizes.items() for part in ("--model-arg", f"{key}={value}")]
    line = ["quantize", *model, "--data", "photos.npz", "--out", "m.onnx", "--file-batch", "4", "--json"]
    done = CliRunner().invoke(app, [*line, "--calibration-batch", "16", "--memory-limit", "2GiB"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["against"]["unseen"], summary["file_batch"]) == (32, True, 4)
    file = onnx.load("m.onnx")
    assert [d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim] == [4, 3, 32, 48]
    recorded = json.loads({entry.key: entry.value for entry in file.metadata_props}[PROVENANCE_KEY])["preprocessing"]
    wanted = {"mean": [0.4, 0.5, 0.6], "std": [0.25] * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
    assert {key: recorded[key] for key in wanted} == wanted
    assert recorded["input_size"] == [3, 32, 48]
    own = CliRunner().invoke(app, ["eval", "m.onnx", "--data", "photos.npz", "--json"])
    assert json.loads(own.stdout)["images"] == 40, own.output
    same = CliRunner().invoke(app, ["eval", "m.onnx", "--data", "photos.npz", "--json", *options.split()[:-2]])
    assert same.stdout == own.stdout
    why = ["why", "m.onnx", "--data", "photos.npz", "--weights", "w.safetensors", "--images", "8", "--json"]
    assert CliRunner().invoke(app, why).exit_code == 0  # of the model at that size
    page = CliRunner().invoke(app, ["report", "m.onnx", "--data", "photos.npz", "--out", "m.html", "--no-bench"])
    assert page.exit_code == 0, page.output
    beside = ["--against", "vit_tiny_patch16_224", "--weights", "w.safetensors"]
    float_page = ["report", "m.onnx", *beside, "--data", "photos.npz", "--out", "f.html", "--no-bench"]
    compared = ["eval", "m.onnx", "--data", "photos.npz", *beside]
    for command in (compared, [*compared, *model[-10:]], ["bench", "m.onnx", *beside[:2]], float_page):
        done = CliRunner().invoke(app, command)  # the float model at that size, by the file's own arguments
        assert done.exit_code == 0, done.output
    Path("net.py").write_text("import torch\n\ndef net(): return torch.nn.Sequential(torch.nn.Flatten())\n")
    entry = next(entry for entry in file.metadata_props if entry.key == PROVENANCE_KEY)
    entry.value = json.dumps({"model": "net.py:net", "weights": "w.safetensors"})
    onnx.save(file, "own.onnx")
    with pytest.warns(UserWarning, match=r"file was made of w\.safetensors; pass --weights w\.safetensors"):
        float_network("eval", Path("own.onnx"), Asked("net.py:net"))
    other = CliRunner().invoke(app, ["eval", "m.onnx", "--data", "photos.npz", "--json", "--mean", "0", "--std", "1"])
    assert other.exit_code == 0
    config = preprocessing_of_file(
        open_session("m.onnx"), Path("m.onnx"), None, options=image_options("eval", None, "0", "0.5")
    )
    assert (config["mean"], config["std"], config["crop_pct"]) == ((0,) * 3, (0.5,) * 3, 1.0)
    facts = of_file("why", Path("m.onnx"))[1]
    network, config = network_of("why", Path("m.onnx"), facts, Named(weights=Path("w.safetensors")))
    assert network(torch.zeros(1, 3, 32, 48)).shape == (1, 3)
    assert {key: list(config[key]) for key in ("input_size", "mean", "std")} == {
        "input_size": [3, 32, 48],
        "mean": wanted["mean"],
        "std": wanted["std"],
    }


def test_the_deployed_script_sees_what_calibration_saw(tmp_path):
    decode = load_script(Path(__file__).resolve().parents[1] / "examples" / "classify_onnxruntime.py").decode
    wide = np.tile(np.array([0, 256, 30_000, 65_535], "<u2"), 4).tobytes()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "dark.png")
    (tmp_path / "inverted.tif").write_bytes(tiff(16, wide, meaning=0))
    (tmp_path / "twelve.tif").write_bytes(tiff(12, bytes([0xFF, 0xF0, 0x00] * 8)))
    for path in tmp_path.iterdir():
        assert np.array_equal(np.asarray(decode(path, 3)), np.asarray(opened(path, 3))), path
    assert decode(tmp_path / "clear.png", 3).getpixel((0, 0)) == (255, 255, 255)
