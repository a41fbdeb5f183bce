"""`ptq4vit bench`: what it times, in which runtimes, and what it says of that in plain words."""

from __future__ import annotations

import json
import time

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.proof.latency import Spread, in_turn
from ptq4vit_fx.tools.bench_report import BenchReport, Timed
from ptq4vit_fx.tools.cli import app

MODEL = "deit_tiny_patch16_224"
SIZES = [part for size in ("img_size=32", "depth=1", "num_classes=5") for part in ("--model-arg", size)]


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model's file in int8 and in float, and one of a fixed batch, as the working directory."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    model = timm.create_model(MODEL, img_size=32, depth=1, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    mapping = ptq.recipes.base_ptq().with_search(n=2, rounds=1)
    converted = ptq.quantize(model, images, qconfig_mapping=mapping, progress=False)
    ptq.export_onnx(converted, folder / "int8.onnx", images[:1])
    ptq.export_onnx(converted, folder / "four.onnx", images[:1], batch=4)
    export_float(model, folder / "float.onnx", images[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def test_runs_are_timed_in_turn():
    order = list[str]()

    def waiting(name, seconds):
        def execute():
            order.append(name)
            time.sleep(seconds)

        return execute

    seen = list[tuple[int, int]]()
    found = in_turn(
        {"slow": waiting("slow", 0.02), "fast": waiting("fast", 0.002)},
        rounds=4,
        show=lambda *counts: seen.append(counts),
    )
    assert order == ["slow", "fast"] * 5  # the first round does not count
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.rounds == 4
    assert found.spread("slow").median >= 20
    assert found.ratio("slow", "fast").low > 1 > found.ratio("fast", "slow").high
    few = in_turn({"one": lambda: None}, seconds=0)
    assert few.rounds == 5


def test_a_file_beside_float_a_model_and_quantize_static(place):
    before = sorted(place.iterdir())
    pair = ["--against", "float.onnx", "--against", MODEL, *SIZES]
    done = run("int8.onnx", *pair, "--static", "--runtime", "onnxruntime", "--rounds", 3, "--threads", 1, "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    names = [row["file"] for row in figures["rows"]]
    assert names == ["int8.onnx", "float.onnx", MODEL, "quantize_static", "quantize_static u8s8 per channel"]
    assert figures["float_files"] == ["float.onnx", MODEL]
    assert (figures["threads"], figures["images"], figures["rounds"]) == (1, 1, 3)
    assert set(figures["versions"]) == {"onnxruntime"}
    for row in figures["rows"]:
        own = row["milliseconds"]
        assert 0 < own["low"] <= own["median"] <= own["high"]
        assert row["images_per_second"] == pytest.approx(1000 / own["median"])
        assert (row["ratio"] is None) == (row["file"] == "int8.onnx")
    assert len(figures["verdict"]) == 4
    assert "u8 x s8 products" in figures["cpu"]
    assert sorted(place.iterdir()) == before


def test_batches_and_words(place):
    done = run("four.onnx", "--runtime", "onnxruntime", "--rounds", 2)
    assert done.exit_code == 0, done.output
    assert "4 images at a time, the runtime's own threads, medians of 2 rounds in turn" in done.stdout
    assert "add --against FLOAT.onnx" in done.stdout
    quiet = run("int8.onnx", "--against", "float.onnx", "--batch", 3, "--rounds", 2, "--quiet")
    assert quiet.exit_code == 0, quiet.output
    assert "float.onnx in onnxruntime" in quiet.stdout
    assert "CPU" not in quiet.stdout


def test_openvino_runs_the_same_files(place):
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    done = run("int8.onnx", "--against", "float.onnx", "--runtime", "openvino", "--rounds", 2, "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert [(row["runtime"], row["file"]) for row in figures["rows"]] == [
        ("openvino", "int8.onnx"),
        ("openvino", "float.onnx"),
    ]


def test_of_files_of_more_inputs_and_of_no_quantized_tensor(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.layer(x) + y

    export_float(Two().eval(), tmp_path / "two.onnx", (torch.randn(1, 4), torch.randn(1, 4)))
    done = run(tmp_path / "two.onnx", "--rounds", 2, "--runtime", "onnxruntime", "--batch", 5)
    assert done.exit_code == 0, done.output
    assert "5 images at a time" in done.stdout


def timed(file, milliseconds, ratio=None, runtime="onnxruntime"):
    return Timed(runtime, file, Spread(milliseconds, milliseconds, milliseconds), ratio)


def reported(file, rows, float_files):
    return BenchReport(file, rows, float_files, 1, 0, 5, "CPU x", 2, {"onnxruntime": "1"})


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (Spread(2.0, 1.9, 2.2), "a.onnx pays: 2.00 times as fast as float.onnx in onnxruntime"),
        (Spread(0.5, 0.4, 0.6), "a.onnx does not pay: it takes 2.00 times as long as float.onnx in onnxruntime; if"),
        (Spread(1.1, 0.9, 1.2), "no clear difference between a.onnx and float.onnx in onnxruntime: 0.90 to 1.20"),
    ],
)
def test_plain_words(ratio, says):
    rows = (timed("dir/a.onnx", 1.0), timed("dir/float.onnx", 2.0, ratio))
    report = reported("dir/a.onnx", rows, ("dir/float.onnx",))
    assert says in report.verdict()[0]
    assert "dir/" not in str(report)  # what tells files apart is shown, no more


def test_files_of_one_name_are_shown_with_their_folders():
    rows = (timed("one/a.onnx", 1.0), timed("two/a.onnx", 2.0, Spread(2.0, 1.9, 2.1)))
    assert "one/a.onnx pays: 2.00 times as fast as two/a.onnx" in str(reported("one/a.onnx", rows, ()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["none.onnx"], "none.onnx"),
        (["int8.onnx", "--runtime", "tensorrt"], "--runtime: expected one of onnxruntime, openvino, got 'tensorrt'"),
        (["int8.onnx", "--against", "int8.onnx"], "--against int8.onnx: expected another file"),
        (["int8.onnx", "--against", "deit_tinny_patch16_224"], "did you mean deit_tiny_patch16_224"),
        (["int8.onnx", "--static"], "--static: expected a float file to quantize, got none"),
        (["four.onnx", "--batch", 3], "--batch 3: expected a file of any batch, got a file that takes 4 at a time"),
        (["int8.onnx", "--against", "four.onnx"], "expected a file that takes 1 image at a time, got one that takes 4"),
        (["int8.onnx", "--against", MODEL, "--model-arg", "depth"], "expected key=value"),
    ],
)
def test_wrong_command_lines_are_sentences(place, options, says):
    done = run(*options)
    assert done.exit_code == 1, done.output
    assert says in done.stderr
    assert len([line for line in done.stderr.splitlines() if line]) == 1
