"""The command line: a real run on a random model, and errors as sentences."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Lock

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.search.search_op import search_op
from ptq4vit_fx.tools.cli import app

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
    kept = ["--checkpoint", workspace / "scales.safetensors"]
    done = run("quantize", "deit_tiny_patch16_224", "--data", images, "--out", out, "--weights", weights, *ARGS, *kept)
    assert done.exit_code == 0, done.output
    assert "broken.png" in done.output
    assert "8 products, 16 sites, W8A8, 6 images (1 skipped)" in done.output
    scored = run("eval", out, "--data", images)
    assert scored.exit_code == 0, scored.output
    assert "of 6 images, 1 skipped" in scored.output
    assert "broken.png" in scored.output
    shown = run("inspect", out)
    assert "blocks.0.attn.matmul_av:lhs" in shown.output
    assert "twin8/softmax" in shown.output
    alone = run("verify", out, "--data", images, "--json")
    assert alone.exit_code == 0, alone.output
    found = json.loads(alone.stdout)
    assert found["simulation"] is None
    assert (found["runtime"]["comparison"]["images"], found["runtime"]["first_divergence"]) == (6, None)
    beside = run("verify", out, "--data", images, "--calibration", kept[1], "--weights", weights)
    assert beside.exit_code == 0, beside.output
    assert "ONNX Runtime against the simulation, 6 images" in beside.output
    other = ptq.Calibration.load(kept[1])
    other.params["head:lhs"].tensors()["scale"].mul_(2)
    other.save(workspace / "other.safetensors")
    refused = run("verify", out, "--data", images, "--calibration", workspace / "other.safetensors")
    assert refused.exit_code == 1
    assert "model.onnx: expected its calibration" in refused.output


@pytest.mark.parametrize(("twins", "site"), [("wide", "twin8 wide/softmax"), ("uniform", "uniform8 unsigned/head")])
def test_quantize_with_other_twins(workspace, twins, site):
    out = workspace / "model.onnx"
    done = run("quantize", *(a.format(w=workspace) for a in GOOD), "--out", out, "--twins", twins)
    assert done.exit_code == 0, done.output
    rows = [line for line in run("inspect", out).output.splitlines() if "blocks.0.attn.matmul_av:lhs" in line]
    assert len(rows) == 1
    assert site in rows[0]


@pytest.mark.parametrize("twins", [[], ["--twins", "auto"]])
def test_quantize_chooses_the_twins_on_images_that_calibration_has_not_seen(workspace, twins):
    """By default; where the data hold no such images it is said, and all stay exact."""
    out, images = workspace / "model.onnx", workspace / "images"
    given = [*(a.format(w=workspace) for a in GOOD), "--out", out, *twins]
    few = run("quantize", *given)
    assert few.exit_code == 0, few.output
    assert "twins: all exact, as images that calibration does not take are needed to choose" in few.output
    assert sum("twin8" in line for line in run("inspect", out).output.splitlines() if ":lhs" in line) == 2
    for number in range(20):
        pixels = np.random.default_rng(9 + number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(images / "a" / f"more{number}.png")
    done = run("quantize", *given, "--images", 8, "--checkpoint", workspace / "scales")
    assert done.exit_code == 0, done.output
    told = re.search(r"twins: (\d) of 2 twins become uniform; KL from float \S+, \S+ with all exact; ", done.output)
    assert told, done.output
    kept = [line for line in run("inspect", out).output.splitlines() if ":lhs" in line and "twin8" in line]
    assert len(kept) == 2 - int(told[1])
    assert (workspace / "scales.forms" / "uniform.safetensors").exists()
    scales = ["--calibration", workspace / "scales", "--weights", workspace / "weights.safetensors"]
    verified = run("verify", out, "--data", images, *scales)
    assert verified.exit_code == 0, verified.output
    again = workspace / "again.onnx"
    assert run("quantize", *given[: -len(twins) or None][:-1], again, *twins, "--images", 8).exit_code == 0
    scales = [{i.name: i.raw_data for i in onnx.load(path).graph.initializer} for path in (out, again)]
    assert scales[0] == scales[1]


def test_quantize_for_a_target_with_a_fixed_batch(workspace):
    out, images = workspace / "model.onnx", workspace / "images"
    options = ["--weights", workspace / "weights.safetensors", *ARGS, "--opset", 17, "--batch", 4]
    arguments = ["quantize", "deit_tiny_patch16_224", "--data", images, "--out", out, *options, "--target", "tensorrt"]
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "add --recipe tensorrt" in refused.output
    assert not out.exists()
    done = run(*arguments, "--recipe", "tensorrt")
    assert done.exit_code == 0, done.output
    assert "opset 17, target tensorrt" in done.output
    scored = run("eval", out, "--data", images)
    assert scored.exit_code == 0, scored.output
    assert "of 6 images, 1 skipped" in scored.output


def test_eval_wants_every_class_or_numbers(workspace):
    out, images = workspace / "model.onnx", workspace / "images"
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    converted = ptq.quantize(model, torch.randn(2, 3, 32, 32), progress=False)
    ptq.export_onnx(converted, out, torch.randn(1, 3, 32, 32))
    shutil.rmtree(images / "b")
    without = run("eval", out, "--data", images)
    assert without.exit_code == 1
    assert "pass --model with the timm model" in without.output
    few = run("eval", out, "--data", images, "--model", "deit_tiny_patch16_224")
    assert few.exit_code == 1
    assert "expected 3 sub-folders, one per class of the model, got 2" in few.output
    for name, number in (("a", "0"), ("c", "2")):
        (images / name).rename(images / number)
    numbered = run("eval", out, "--data", images, "--model", "deit_tiny_patch16_224")
    assert numbered.exit_code == 0, numbered.output
    assert "of 4 images, 1 skipped" in numbered.output
    (images / "0").rename(images / "1")
    (images / "2").rename(images / "3")
    from_one = run("eval", out, "--data", images, "--model", "deit_tiny_patch16_224")
    assert from_one.exit_code == 1
    assert "got 2, numbered up to 3" in from_one.output


W, D = "deit_tiny_patch16_224", "{w}/images"
GOOD = [W, "--data", D, "--weights", "{w}/weights.safetensors", *ARGS]
BAD = {
    "unknown model": (["deit_tinny_patch16_224", "--data", D], "did you mean deit_tiny_patch16_224"),
    "no hub": ([W, "--data", D], "pass --weights FILE with a local checkpoint"),
    "missing folder": ([W, "--data", "{w}/none", *GOOD[3:]], "expected a folder of images, got no such folder"),
    "empty folder": ([W, "--data", "{w}/empty", *GOOD[3:]], "expected one image or more, got an empty folder"),
    "nothing readable": (
        [W, "--data", "{w}/unreadable", *GOOD[3:]],
        "expected one readable image or more, got none of",
    ),
    "wrong state dict": (GOOD[:5], "expected a state dict of this model"),
    "missing folder before the hub": ([W, "--data", "{w}/none"], "expected a folder of images, got no such folder"),
    "target": ([*GOOD, "--target", "tensort"], "did you mean tensorrt?"),
    "opset": ([*GOOD, "--opset", "16"], "opset: expected 17 to"),
    "target without twins": (
        [*GOOD, "--target", "tensorrt"],
        "tensorrt or base with the target tensorrt, got 'best'",
    ),
    "missing weights": ([*GOOD[:4], "{w}/none.safetensors", *ARGS], "expected a state dict of this model"),
    "pickle": ([*GOOD[:4], "{w}/evil.pth", *ARGS], "expected a state dict of this model"),
    "twins": ([*GOOD, "--twins", "best"], "expected exact or wide or uniform or auto with the recipe best"),
    "twins of base": ([*GOOD, "--recipe", "base", "--twins", "auto"], "expected exact with the recipe base"),
    "bits": ([*GOOD, "--w-bits", "9"], "expected an integer from 2 to 8, got 9"),
    "recipe": ([*GOOD, "--recipe", "bset"], "expected best, ptq4vit, tensorrt or base, got 'bset'"),
    "model argument": ([*GOOD, "--model-arg", "depth"], "expected key=value"),
    "NaN weights": ([*GOOD[:4], "{w}/nan.safetensors", *ARGS], "parameter norm.weight: expected finite values"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(workspace, monkeypatch, case):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (workspace / "empty").mkdir()
    (workspace / "unreadable").mkdir()
    (workspace / "unreadable" / "a.jpg").write_text("no")
    torch.save({"x": NotATensor()}, workspace / "evil.pth")
    state = load_file(workspace / "weights.safetensors")
    save_file(state | {"norm.weight": state["norm.weight"] * float("nan")}, workspace / "nan.safetensors")
    arguments, sentence = BAD[case]
    before = sorted(workspace.rglob("*"))
    result = run("quantize", *(a.format(w=workspace) for a in arguments), "--out", workspace / "model.onnx")
    assert result.exit_code == 1, result.output
    assert sentence in result.output
    assert "Traceback" not in result.output
    assert sorted(workspace.rglob("*")) == before


class NotATensor:
    pass


@pytest.mark.parametrize("out", ["{w}/none/model.onnx", "{w}/images"])
def test_out_is_checked_before_the_work(workspace, out):
    result = run("quantize", *(a.format(w=workspace) for a in GOOD), "--out", out.format(w=workspace))
    assert result.exit_code == 1
    assert "expected a file in an existing, writable folder" in result.output
    assert "calibrate" not in result.output


@pytest.mark.parametrize(
    ("options", "got"),
    [
        (["--out", "-"], "'-': expected a file, got standard output, which is not supported"),
        (["--out", "{w}/new/"], "expected the path of a file, got that of a folder"),
        (["--out", ""], "expected the path of a file, got that of a folder"),
        (["--out", "/dev/null"], "writable folder, got a device; choose another path"),
        (["--out", "{w}/m.onnx", "--checkpoint", "{w}/none/scales"], "quantize --checkpoint: "),
    ],
)
def test_what_is_no_file_is_refused_before_the_work(workspace, options, got):
    before = sorted(workspace.rglob("*"))
    result = run("quantize", *(a.format(w=workspace) for a in (*GOOD, *options)))
    assert result.exit_code == 1
    assert got in result.output
    assert "calibrate" not in result.output
    assert sorted(workspace.rglob("*")) == before


def test_interrupt_during_calibration_leaves_nothing(workspace, monkeypatch):
    searched: list[str] = []

    def interrupted(op, *args, **kwargs):  # Ctrl-C in the fourth search
        searched.append(op.name)
        if len(searched) == 4:
            raise KeyboardInterrupt
        return search_op(op, *args, **kwargs)

    monkeypatch.setattr("ptq4vit_fx.calibrating.group_search.search_op", interrupted)
    before = sorted(workspace.rglob("*"))
    result = run("quantize", *(a.format(w=workspace) for a in GOOD), "--out", workspace / "model.onnx")
    assert result.exit_code == 130
    assert 4 <= len(searched) <= 4 + torch.get_num_threads()  # those beside it end, no other begins
    assert "interrupted: nothing was written" in result.output
    assert sorted(workspace.rglob("*")) == before


def test_the_same_command_goes_on_from_a_checkpoint(workspace, monkeypatch):
    searched: list[str] = []
    stop: list[int | None] = [4]
    lock = Lock()

    def interrupted(op, *args, **kwargs):
        with lock:
            if len(searched) == stop[0]:
                raise KeyboardInterrupt
            searched.append(op.name)
        return search_op(op, *args, **kwargs)

    monkeypatch.setattr("ptq4vit_fx.calibrating.group_search.search_op", interrupted)
    command = ["quantize", *(a.format(w=workspace) for a in GOOD), "--out", workspace / "model.onnx"]
    command += ["--checkpoint", workspace / "scales.safetensors", "--memory-limit", "1"]
    first = run(*command)
    assert first.exit_code == 130
    assert "the same command goes on from there" in first.output
    stop[0] = None
    second = run(*command)
    assert second.exit_code == 0, second.output
    assert len(searched) == len(set(searched)) == 8
    other = run(*command, "--loss", "fisher")
    assert other.exit_code == 1
    assert "got another loss; choose another path or delete the file" in other.output


@pytest.fixture
def interruptible():
    """A child inherits an ignored SIGINT, as background jobs have it; a handled one becomes the default."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_control_c_during_calibration_leaves_nothing(workspace):
    images = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(workspace / "images" / "a" / f"more{number}.png")
    model = timm.create_model(W, img_size=64, num_classes=3)
    save_file(model.state_dict(), workspace / "weights.safetensors")
    before = sorted(workspace.rglob("*"))
    arguments = [W, "--data", workspace / "images", "--weights", workspace / "weights.safetensors"]
    arguments += ["--model-arg", "img_size=64", "--model-arg", "num_classes=3", "--out", workspace / "model.onnx"]
    command = [Path(sys.executable).parent / "ptq4vit", "quantize", *arguments]
    environment = os.environ | {"FORCE_COLOR": "1"}  # the progress bar is drawn into a pipe, too
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        shown = b""
        while b"search and round: " not in shown:
            chunk = process.stdout.read1()
            assert chunk, shown.decode()
            shown += chunk
        process.send_signal(signal.SIGINT)
        shown += process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert b"interrupted: nothing was written" in shown
    assert b"Traceback" not in shown
    assert sorted(workspace.rglob("*")) == before
