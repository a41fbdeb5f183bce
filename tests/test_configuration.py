"""Options in a file, per product, and what would be done with them: --config, --print-config, --set, --plan."""

from __future__ import annotations

import inspect
import json
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from ptq4vit_fx.errors import PTQError
from ptq4vit_fx.export.metadata import PLAN_KEY
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.tools import cli
from ptq4vit_fx.tools.config_file import NOT_IN_A_FILE, as_toml, options_of, read_config
from ptq4vit_fx.tools.devices import check_device

CONFIG = """\
# A run on two blocks.
model = "deit_tiny_patch16_224"
data = "images"
out = "m.onnx"
weights = "w.safetensors"
model-arg = ["img_size=32", "depth=2", "num_classes=3"]
w_bits = 4
images = 4
no-bench = true
set = ["blocks.*.mlp.fc2=w8a6", "blocks.1.attn=float"]
skip = "head"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configuration")
    (folder / "images").mkdir()
    for number in range(14):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:02}.png")
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    save_file(model.state_dict(), folder / "w.safetensors")
    (folder / "q.toml").write_text(CONFIG)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.app, ["quantize", *map(str, arguments)])


def test_every_option_has_a_name_in_a_file():
    options = {option.name: option for option in options_of(cli.quantize)}
    parameters = [name for name in inspect.signature(cli.quantize).parameters if name != "context"]
    assert [option.parameter for option in options.values()] == parameters
    assert (options["bench"].off, options["json"].off, options["set"].many) == ("no-bench", None, True)
    assert {"data", "out", "weights", "checkpoint", "float-onnx", "labels", "config"} <= {
        name for name, option in options.items() if option.path
    }
    assert (options["images"].low, options["fail-under"].high) == (1, 1)
    shown = run("--help").output
    unseen = ("model", "batch-size")  # an argument, and the older name of calibration-batch
    assert all(f"--{name}"[:12] in shown for name in options if name not in unseen)


def test_a_file_is_read_beside_itself_and_the_command_line_wins(place, monkeypatch):
    monkeypatch.chdir(place.parent)
    config = f"{place.name}/q.toml"
    values = read_config(place / "q.toml", cli.quantize)
    assert (values["data"], values["w_bits"], values["bench"]) == (str(place / "images"), 4, False)
    done = run("--config", config, "--print-config", "--w-bits", 6, "--set", "head=w5", "--out", "here.onnx")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    for line in (
        "w-bits = 6",
        'set = ["head=w5"]',
        f'out = "{place.parent}/here.onnx"',
        f'data = "{place}/images"',
        'skip = ["head"]',
        "bench = false",
        "a-bits = 8",
    ):
        assert line in lines
    (place / "again.toml").write_text(done.stdout)
    again = run("--config", place / "again.toml", "--print-config")
    assert again.stdout == done.stdout


def test_paths_in_a_file_may_be_absolute_or_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "q.toml").write_text("data = '~/photos'\nout = '/x/m.onnx'\nfloat_onnx = '-'\n", encoding="utf-8-sig")
    assert read_config(tmp_path / "q.toml", cli.quantize) == {
        "data": "/home/somebody/photos",
        "out": "/x/m.onnx",
        "float_onnx": "-",
    }


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("deit_tiny_patch16_224", "deit_tiny_patch16_224"),
        ("hf-hub:timm/x", "hf-hub:timm/x"),
        ("org/name", "org/name"),
        ("local-dir:mine", "local-dir:{folder}/mine"),
        ("./mine", "{folder}/mine"),
        ("nets/own.py:Net", "{folder}/nets/own.py:Net"),
        ("/x/own.py:Net", "/x/own.py:Net"),
    ],
)
def test_models_that_are_files_are_beside_the_file(tmp_path, written, read):
    (tmp_path / "q.toml").write_text(f"model = '{written}'\n")
    values = read_config(tmp_path / "q.toml", cli.quantize)
    assert values == {"model": read.format(folder=tmp_path)}
    assert f'model = "{values["model"]}"' in as_toml(cli.quantize, values).splitlines()


def made(
    context: typer.Context,
    kept: Annotated[bool | None, typer.Option("--kept/--dropped")] = None,
    batch: Annotated[int | None, typer.Option("--file-batch", "--batch")] = None,
) -> None: ...


def test_options_of_several_names(tmp_path):
    kept, batch = options_of(made)
    assert (kept.names, kept.off, batch.names, batch.off) == (("kept",), "dropped", ("file-batch", "batch"), None)
    (tmp_path / "q.toml").write_text("dropped = true\nbatch = 4\n")
    values = read_config(tmp_path / "q.toml", made)
    assert values == {"kept": False, "batch": 4}
    assert as_toml(made, values).splitlines()[1:] == ["kept = false", "file-batch = 4"]


def test_numbers_may_stand_without_quotes(tmp_path):
    (tmp_path / "q.toml").write_text("memory-limit = 8\nimg-size = 224\nmean = 0.5\n")
    values = read_config(tmp_path / "q.toml", cli.quantize)
    assert values == {"memory_limit": 8, "img_size": 224, "mean": 0.5}
    (tmp_path / "q.toml").write_text("recipe = 8\n")
    with pytest.raises(PTQError, match="line 1: recipe: expected a string, got 8"):
        read_config(tmp_path / "q.toml", cli.quantize)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
DRAWN = {bool: st.booleans(), int: st.integers(1, 2**53), float: st.floats(0, 1, exclude_min=True)}


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(tmp_path_factory, data):
    values = {}
    for option in options_of(cli.quantize):
        if option.name not in NOT_IN_A_FILE and option.name != "plan" and not option.path:
            drawn = st.just("vit") if option.model else DRAWN.get(option.kind, TEXTS)
            values[option.parameter] = data.draw(st.lists(drawn, min_size=1) if option.many else drawn)
    path = tmp_path_factory.mktemp("written") / "q.toml"
    path.write_text(as_toml(cli.quantize, values), encoding="utf-8")
    assert read_config(path, cli.quantize) == values


def test_a_plan_says_what_would_be_done_and_does_nothing(place, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    done = run("--config", "q.toml", "--plan", "--device", "auto")
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    for part in (
        "deit_tiny_patch16_224, 1.04 M parameters",
        "4 for calibration; compared with float on 10 others",
        "2 blocks.*.mlp.fc2 twin6/gelu uniform8/channel",
        "1 blocks.0.attn.matmul_av twin8/softmax",
        "head: left float by skip 'head'",
        "and 1 more: left float by skip 'blocks.1.attn'",
        "transforms rotation, blocks.0.norm1",
        "--set blocks.*.mlp.fc2=w8a6: 2 products",
        "writes m.onnx",
    ):
        assert part in text
    assert "warning" not in done.stderr
    figures = json.loads(run("--config", "q.toml", "--plan", "--json").stdout)
    assert sum(len(group["products"]) for group in figures["groups"]) == 9
    assert (figures["images"], figures["why_seen"], figures["skipped"]) == ([4, 10], "", [])
    assert 0 < figures["multiplications"][1] < figures["multiplications"][0]
    assert sorted(place.rglob("*")) == before


def test_a_run_keeps_to_its_options(place, monkeypatch):
    monkeypatch.chdir(place)
    names = ["--input-name", "pixels", "--output-name", "scores", "--float-onnx", "f.onnx"]
    options = ["--sequential", "--device", "auto", "--weights-granularity", "tensor", "--verbose", *names]
    done = run("--config", "q.toml", *options, "--recipe", "ptq4vit")
    assert done.exit_code == 0, done.output
    assert "--set blocks.*.mlp.fc2=w8a6: 2 products, blocks.0.mlp.fc2, blocks.1.mlp.fc2" in done.stdout
    assert "--skip head: 1 product, head" in done.stdout
    assert 'set = ["blocks.*.mlp.fc2=w8a6", "blocks.1.attn=float"]' in done.stdout.splitlines()
    assert "9 products, 18 sites, W4A8, 2 with --set, 4 images" in done.stdout
    assert "stay float" not in done.stderr
    for file in ("m.onnx", "f.onnx"):
        session = onnxruntime.InferenceSession(place / file)
        assert [(x.name, x.shape[0]) for x in session.get_inputs()] == [("pixels", "batch")]
        assert [x.name for x in session.get_outputs()] == ["scores"]
    metadata = {entry.key: entry.value for entry in onnx.load(place / "m.onnx").metadata_props}
    quantizers = QuantPlan.from_json(metadata[PLAN_KEY]).quantizers
    assert (quantizers["blocks.0.mlp.fc2:lhs"].bits, quantizers["blocks.0.mlp.fc2:rhs"].bits) == (6, 8)
    assert quantizers["blocks.1.mlp.fc1:rhs"].granularity == "tensor"
    assert quantizers["blocks.1.mlp.fc1:rhs"].bits == 4
    assert not {"head:lhs", "blocks.1.attn.qkv:lhs"} & quantizers.keys()


def test_auto_is_a_device_that_is_there():
    assert check_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert check_device("cpu") == "cpu"
