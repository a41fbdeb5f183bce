"""What quantize and eval say about a file against the float model, by text, by numbers and by exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.data.reading import load_named
from ptq4vit_fx.export.proof import verify
from ptq4vit_fx.export.targets import TARGETS
from ptq4vit_fx.inputs import progress
from ptq4vit_fx.inputs.progress import UnderWay
from ptq4vit_fx.tools.advice import helpful_flags, most_expensive
from ptq4vit_fx.tools.cli import app
from ptq4vit_fx.tools.held_out import images_to_compare
from ptq4vit_fx.tools.phases import (
    CALIBRATE,
    COMPARE,
    CONVERT,
    EXPORT,
    FLOAT,
    IMPORT,
    MEASURE,
    READ,
    TRACE,
    VERIFY,
)
from ptq4vit_fx.tools.phases import (
    MODEL as LOAD,
)
from ptq4vit_fx.tools.proving import full_batches, proved
from ptq4vit_fx.tools.runtimes import made_for
from ptq4vit_fx.tools.terminal import forms_beside, readable_errors

MODEL = "deit_tiny_patch16_224"
SIZES = [part for size in ("img_size=32", "depth=1", "num_classes=50") for part in ("--model-arg", size)]
OPTIONS = [MODEL, "--data", "images", "--weights", "weights.safetensors", *SIZES, "--images", 8]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of 50 classes and 20 images of 4 of them, as the working directory."""
    folder = tmp_path_factory.mktemp("reports")
    for number in range(20):
        (folder / "images" / str(number % 4)).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / str(number % 4) / f"{number}.png")
    torch.manual_seed(0)
    model = timm.create_model(MODEL, img_size=32, depth=1, num_classes=50)
    save_file(model.state_dict(), folder / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def quantized(place):
    return run("quantize", *OPTIONS, "--out", "good.onnx", "--float-onnx", "float.onnx")


def report_of(result) -> list[str]:
    """Return the lines of the end of a run on standard output."""
    lines = result.stdout.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("float ")) :]


def test_the_end_of_quantize(quantized, place):
    assert quantized.exit_code == 0, quantized.output
    report = report_of(quantized)
    assert len(report) <= 20 - 4  # a warning takes as many
    assert all(len(line) <= 80 for line in report), report
    text = "\n".join(report)
    for part in (
        "float       same class on ",
        " of 12 images: ",
        "images that calibration has not seen",
        "worst image ",
        " times float here",
        "simulation  the file computes it: bit-equal on 100.0% of 8 images",
        "file        good.onnx",
        " MB (float ",
        "8 products, 16 sites, W8A8, 8 images (0 skipped)",
        "next        ptq4vit eval good.onnx --data LABELLED --against float.onnx",
        "            ptq4vit inspect good.onnx",
    ):
        assert part in text, (part, text)
    assert re.search(r"worst image \d+ \([0-3]/\d+\.png\): class \d", text)
    assert "MatMul" not in text
    assert (place / "float.onnx").stat().st_size > 2 * (place / "good.onnx").stat().st_size


def test_the_page_at_the_end_of_quantize(place):
    options = ["--out", "paged.onnx", "--report", "page.html", "--checkpoint", "scales.safetensors", "--no-bench"]
    done = run("quantize", *OPTIONS, *options, "--w-bits", 3, "--a-bits", 3)
    assert done.exit_code == 0, done.output
    assert "report      page.html" in report_of(done)
    page = (place / "page.html").read_text()
    sizes = " ".join(SIZES)
    command = f"ptq4vit quantize {MODEL} --data images --out paged.onnx --weights weights.safetensors {sizes}"
    assert (
        f"{command} --w-bits 3 --a-bits 3 --images 8 --checkpoint scales.safetensors --no-bench --report page.html"
        in page
    )
    for part in (
        "same class on ",
        "images that calibration has not seen",
        "not measured, --no-bench",
        "<li>worse than float: same class on ",
        "ptq4vit eval paged.onnx --data LABELLED",
    ):
        assert part in page, part


def test_a_page_of_a_file_and_one_of_its_calibration(quantized, place):
    assert quantized.exit_code == 0, quantized.output
    against = ["--against", MODEL, "--weights", "weights.safetensors", *SIZES]
    done = run("report", "good.onnx", "-o", "r.html", "--data", "images", *against, "--images", 6, "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["missing"] == {}
    assert figures["against"]["images"] == 6
    assert figures["against"]["worst"]["name"].endswith(".png")
    assert figures["float_times"]["total"] > 0
    assert len(figures["sites"]) == 16
    alone = run("report", "good.onnx", "-o", "alone.html", "--no-bench")
    assert alone.stdout.splitlines()[0] == "alone.html"
    assert "add --data FOLDER of images and --against" in alone.stdout
    assert (place / "alone.html").stat().st_size < (place / "r.html").stat().st_size


def test_a_poor_file_is_said_to_be_so_first(place):
    bits = ["--w-bits", 3, "--a-bits", 3, "--twins", "exact"]
    poor = run("quantize", *OPTIONS, "--out", "poor.onnx", *bits, "--no-bench", "--fail-under", 0.95)
    assert poor.exit_code == 3, poor.output
    warning, *_, error = [line for line in poor.stderr.splitlines() if line.startswith(("warning: w", "error: "))]
    assert warning.startswith("warning: worse than float: same class on ")
    assert "below 99%; most of the distance: " in warning
    assert "try --w-bits 8 --a-bits 8, --twins wide, --images 20, --skip " in warning
    assert "quantize: --fail-under: expected 95.0% or more, got " in error
    assert error.endswith("the file is kept: poor.onnx")
    assert (place / "poor.onnx").exists()
    assert poor.output.index("warning: worse than float") < poor.output.index("float       same class on ")
    assert "speed       not measured, --no-bench" in poor.stdout
    assert "warning" not in "\n".join(report_of(poor)[:5])


def test_numbers_behind_every_line(place):
    options = ["--no-bench", "--json", "--skip", "head", "--output-kind", "embeddings"]
    done = run("quantize", *OPTIONS, "--out", "json.onnx", *options, "--fail-under", 0.5)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    against = figures["against"]
    assert (against["kind"], against["decided"], against["unseen"]) == ("embeddings", "as asked for", True)
    assert against["recall"]["of"] == against["images"] == 12
    assert 0.5 < against["score"] <= 1
    assert figures["verified"]["ok"] is True
    assert figures["bits"] == {"weights": 8, "activations": 8}
    assert figures["left_float"] == 1
    assert figures["products"] == 7
    assert figures["exported"]["path"] == "json.onnx"
    assert figures["latency"] is None
    assert sum(figures["expensive"].values()) <= 1
    assert not any("head" in warning for warning in figures["warnings"])  # as asked for
    quiet = run("quantize", *OPTIONS, "--out", "quiet.onnx", "--no-bench", "--quiet", "--output-kind", "class")
    assert quiet.exit_code == 1
    assert quiet.stdout == ""
    assert "kind: expected one of classes, embeddings, values, got 'class'" in quiet.stderr
    assert not (place / "quiet.onnx").exists()


def test_products_left_float_are_said_to_be(place):
    done = run("quantize", *OPTIONS, "--out", "partly.onnx", "--no-bench", "--skip", "blocks.0.mlp")
    assert done.exit_code == 0, done.output
    text = "\n".join(report_of(done))
    assert "6 products, 12 sites, W8A8, 8 images (0 skipped)\n            2 products left float" in text
    if "bit-equal on 100.0%" not in text:
        assert "            2 products left float, whose last bits differ" in text


def test_eval_against_the_float_file_and_the_model(quantized, place):
    assert quantized.exit_code == 0, quantized.output
    by_file = run("eval", "good.onnx", "--data", "images", "--against", "float.onnx", "--per-class")
    assert by_file.exit_code == 0, by_file.output
    for part in ("of 20 images, 0 skipped", "top-5 ", "float top-1 ", "points, standard error ", "classes lose"):
        assert part in by_file.stdout
    weights = ["--weights", "weights.safetensors", *SIZES]
    by_model = run("eval", "good.onnx", "--data", "images", "--against", MODEL, *weights, "--json")
    figures = json.loads(by_model.stdout)
    assert figures["images"] == figures["pair"]["same"]["of"] == 20
    session = onnxruntime.InferenceSession(place / "float.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    both = [run("eval", file, "--data", "images", "--json") for file in ("good.onnx", "float.onnx")]
    for side, result in zip(("score", "float_score"), both, strict=True):
        assert json.loads(result.stdout)["score"] == figures[side]
    other = run("eval", "good.onnx", "--data", "images", "--against", "good.onnx", *weights)
    assert other.exit_code == 1
    assert "leave these out: the file holds its weights" in other.stderr
    alone = run("eval", "good.onnx", "--data", "images", "--per-class")
    assert alone.exit_code == 1
    assert "add --against" in alone.stderr


def flat(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_images_that_calibration_has_not_seen(tmp_path):
    paths = []
    for number in range(30):
        paths.append(tmp_path / f"{number:02}.png")
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(paths[-1])
    taken = paths[:10]
    calibrated = load_named(taken, flat, [])
    others = images_to_compare(paths, range(10), calibrated, flat, 3)
    assert others.unseen
    assert others.names == tuple(map(str, paths[10:]))
    assert others.pixels[:, 0, 0, 0].tolist() == list(range(10, 30))
    assert others.reason == ""
    none = images_to_compare(taken, range(10), calibrated, flat, 3)
    assert (none.unseen, len(none.pixels), none.reason) == (False, 10, "the data hold no others")
    few = images_to_compare(paths[:15], range(10), calibrated, flat, 3)
    assert (few.unseen, few.names) == (False, tuple(map(str, taken)))
    assert few.reason == "the data hold 5 others: fewer than 8 to compare on"
    for number in range(10, 28):  # copies of what calibration took
        paths[number].write_bytes(paths[0].read_bytes())
    copies = images_to_compare(paths, range(10), calibrated, flat, 3)
    assert not copies.unseen
    assert "hold 20 others, and 18 of them are the same pictures" in copies.reason


class Asked:
    recipe, twins, w_bits, a_bits, images = "best", "exact", 8, 8, 128


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, ()),
        ({"w_bits": 4}, ("--w-bits 8",)),
        ({"w_bits": 3, "a_bits": 3}, ("--w-bits 8 --a-bits 8", "--twins wide")),
        ({"recipe": "base", "images": 32}, ("--recipe best", "--images 128")),
        ({"twins": "uniform"}, ("--twins exact",)),
        ({"recipe": "tensorrt", "w_bits": 4}, ("--w-bits 8",)),
        ({"images": 100}, ("--images 110",)),
    ],
)
def test_options_that_help(changes, flags):
    asked = type("Changed", (Asked,), changes)()
    assert helpful_flags(asked, 10 if asked.images == 100 else 500) == flags


def test_the_most_expensive_products(small_converted):
    found = most_expensive(small_converted.calibration)
    after = {name: distance for name, (_, distance) in small_converted.calibration.distances.items()}
    assert list(found) == sorted(after, key=lambda name: -after[name])[:3]
    assert sum(most_expensive(small_converted.calibration, 100).values()) == pytest.approx(1)


def test_version_and_python_m():
    shown = run("--version")
    assert (shown.exit_code, shown.stdout) == (0, "ptq4vit 0.1.0\n")
    assert "3 the file is written, and worse" in " ".join(run("--help").stdout.split())
    program = [sys.executable, "-X", "importtime", "-m", "ptq4vit_fx", "--help"]
    started = subprocess.run(program, capture_output=True, text=True, check=True)
    assert "Usage: ptq4vit " in started.stdout
    imported = {line.split("|")[-1].strip() for line in started.stderr.splitlines()}
    assert not {"torch", "numpy", "timm", "onnx"} & imported
    refused = subprocess.run([*program[:1], "-m", "ptq4vit_fx", "inspect"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2


def test_every_command_answers_in_json(quantized, place):
    assert quantized.exit_code == 0, quantized.output
    targets = run("targets", "--json")
    assert targets.exit_code == 0, targets.output
    assert {"name", "flags", "note"} == set(json.loads(targets.stdout)["runtimes"][0])
    inspected = run("inspect", "good.onnx", "--json")
    assert json.loads(inspected.stdout)["cpu"]["cpu"]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options, name
        assert "--quiet" in options or name in ("eval", "inspect", "targets", "timings", "why"), name
    help_text = run("--help").stdout
    assert "--install-completion" in help_text


def test_one_line_says_which_runtime_the_file_is_for(quantized):
    (line,) = [line for line in report_of(quantized) if line.startswith("runtime ")]
    assert line == "runtime     ONNX Runtime, x86; slower than float in OpenVINO: --target openvino"
    assert all(made_for(name) != "see `ptq4vit targets`" for name in TARGETS)
    assert all(len(made_for(name)) <= 68 for name in TARGETS)


def test_the_proof_is_short_where_every_bit_is_the_same(quantized, place, monkeypatch, small_converted, small_images):
    ptq.export_onnx(small_converted, place / "small.onnx", small_images[:1])
    many = torch.cat([small_images] * 5)[:20]
    seen = list[UnderWay]()
    short = proved(place / "small.onnx", small_converted, full_batches(many, None, 8), seen.append)
    assert short.ok
    assert (short.images, short.same_functions.bit_equal) == (8, 1.0)
    assert max(layer.images for layer in short.layers) == 1
    monkeypatch.setattr(verify, "products_saturate", lambda: True)  # what a CPU without VNNI needs all images for
    whole = proved(place / "small.onnx", small_converted, full_batches(many, None, 8), seen.append)
    assert (whole.images, max(layer.images for layer in whole.layers)) == (20, 8)
    monkeypatch.undo()
    other = onnx.load(place / "small.onnx")
    scale = next(x for x in other.graph.initializer if "scale" in x.name and "coarse" not in x.name and not x.dims)
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    onnx.save(other, place / "changed.onnx")
    wrong = proved(place / "changed.onnx", small_converted, full_batches(many, None, 8), seen.append)
    assert not wrong.ok
    assert wrong.images == 20
    assert wrong.first_divergence is not None


def test_batches_of_a_fixed_size_are_filled_up_from_the_front():
    pixels = torch.arange(5.0)[:, None]
    assert [batch.flatten().tolist() for batch in full_batches(pixels, 4, 8)] == [[0, 1, 2, 3], [4, 0, 1, 2]]
    assert [len(batch) for batch in full_batches(pixels, None, 2)] == [2, 2, 1]


def test_seconds_of_every_phase_are_in_the_numbers(place):
    done = run("quantize", *OPTIONS, "--out", "phases.onnx", "--json")
    assert done.exit_code == 0, done.output
    taken = json.loads(done.stdout)["phases"]
    assert set(taken) == {IMPORT, LOAD, READ, TRACE, CALIBRATE, CONVERT, EXPORT, VERIFY, COMPARE, FLOAT, MEASURE}
    assert all(seconds >= 0 for seconds in taken.values())
    assert not [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]


def test_a_line_now_and_then_where_there_is_no_terminal(place, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    done = run("quantize", *OPTIONS, "--out", "beats.onnx", "--no-bench")
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    for phase in (TRACE, EXPORT):
        assert any(line.startswith(f"{phase}, 0:0") for line in lines), lines
    assert any(re.match(r"search and round: \d+ of 8 products, 0:0\d", line) for line in lines)
    assert not [line for line in done.stdout.splitlines() if "to go" in line]
    for option in ("--quiet", "--json"):
        silent = run("quantize", *OPTIONS, "--out", "beats.onnx", "--no-bench", option)
        assert not [line for line in silent.stderr.splitlines() if not line.startswith("warning: ")]


def test_an_interrupted_tuning_says_where_its_forms_are(tmp_path, capsys):
    checkpoint = tmp_path / "scales.safetensors"
    forms_beside(checkpoint).mkdir()
    with pytest.raises(typer.Exit) as left, readable_errors(checkpoint):
        raise KeyboardInterrupt
    assert left.value.exit_code == 130
    assert f"interrupted: finished products are in {checkpoint}.forms, the same" in capsys.readouterr().err
