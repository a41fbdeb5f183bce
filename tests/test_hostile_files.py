"""Whoever wrote an ONNX file: inspect, eval, verify_onnx and read_scales return a value or raise one sentence."""

from __future__ import annotations

import json
import resource
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hostile import EVIL, Case
from hostile.changes import CHANGES
from hostile.places import PLACES
from hostile.programs import PROGRAMS, WEIGHTS, nested
from hostile.records import PREPROCESSING, RECORDS
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.export.metadata import PROVENANCE_KEY
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.proof.inspection import inspect_file
from ptq4vit_fx.export.proof.openvino_runtime import openvino_graph
from ptq4vit_fx.export.scales import read_scales
from ptq4vit_fx.tools.cli import app
from ptq4vit_fx.tools.evaluation import evaluate_file
from ptq4vit_fx.tools.phases import Phases
from ptq4vit_fx.tools.shards import Question

CASES: dict[str, Case] = PLACES | RECORDS | CHANGES | PROGRAMS | WEIGHTS
#: Memory that a file may make its readers take.
MOST = 2**30


@pytest.fixture(scope="module")
def good(small_converted, small_images, tmp_path_factory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("good") / "model.onnx"
    ptq.export_onnx(small_converted, path, small_images[:1])
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == PROVENANCE_KEY:
            entry.value = json.dumps(json.loads(entry.value) | {"preprocessing": PREPROCESSING})
    return model


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for label in range(5):
        (folder / str(label)).mkdir()
        Image.fromarray(np.full((16, 16, 3), 40 * label, np.uint8)).save(folder / str(label) / "a.png")
    return folder


@pytest.fixture(scope="module")
def readers(small_converted, small_images, labelled):
    return (
        lambda path: f"{inspect_file(path)}{inspect_file(path).to_json()}",
        lambda path: repr(read_scales(path)),
        lambda path: str(evaluate_file(Question(path, labelled), Phases(Console(quiet=True)))),
        lambda path: str(ptq.verify_onnx(path, small_converted, small_images[:4], layers=2)),
    )


def said(read, path: Path) -> tuple[bool, str]:
    """Return whether a reader accepts a file, and what it returns or the sentence that it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ptq.PTQWarning)
        try:
            return True, read(path)
        except ptq.PTQError as error:
            return False, str(error)


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_or_refused_in_one_sentence(good, readers, tmp_path, capfd, caplog, name):
    (tmp_path / "folder").mkdir()
    path = CASES[name](good, tmp_path / "folder")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in readers:
        accepted, text = said(read, path)
        shown = text.replace("\n", "") if accepted else text
        assert shown.isprintable(), ascii(shown)
        assert accepted or ascii(path.name)[1:9] in text or path.name in text
        assert accepted or len(text) < 5000
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST
    assert not [other for other in tmp_path.rglob("*") if other.name.startswith((".", "tmp"))]


@pytest.mark.parametrize("name", CASES)
def test_openvino_reads_it_or_refuses_it_in_one_sentence(good, tmp_path, name):
    pytest.importorskip("openvino")
    (tmp_path / "folder").mkdir()
    accepted, text = said(lambda path: str(openvino_graph(path)), CASES[name](good, tmp_path / "folder"))
    assert accepted or text.isprintable()


def test_what_others_read_is_logged_as_always(good, caplog):
    damaged = onnx.ModelProto.FromString(good.SerializeToString())
    damaged.graph.node[0].input[0] = "nothing"
    ir.from_proto(damaged)
    assert "Input 'nothing' of node" in caplog.text


def test_the_good_file_is_read_by_all(good, readers, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(good.SerializeToString())
    assert [said(read, path)[0] for read in readers] == [True] * 4


@pytest.mark.sweep
def test_a_file_cut_anywhere_and_any_bit_turned(good, readers, tmp_path):
    content, path = good.SerializeToString(), tmp_path / "model.onnx"
    random = np.random.default_rng(0)
    for place in random.integers(0, len(content), 60):
        path.write_bytes(content[:place])
        for read in readers:
            said(read, path)
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << int(random.integers(8))]) + content[place + 1 :]
        )
        for read in readers:
            said(read, path)


WORDS = {
    "a pipe": "expected an ONNX model, got a pipe; check the path",
    "20 GB of nothing": "which has less than 2 GiB without the weights beside it, got 21474836480 bytes",
    "batch of 1e9": "GiB for the 1000000000 images that the file takes at once",
    "images of 1e6 x 1e6": "GiB for an image of 1000000 x 1000000 pixels",
    "tensors of 1e12": "bytes in a file of",
    "8 TB of nothing as weights": "8192.0 GiB for the weights beside it",
    "a device as weights": "the weights w lie outside of the file's folder, at /dev/zero",
    "a pipe as weights": "/weights: a pipe",
    "opset 99": "for domain ai.onnx is till opset",
    "Ifs within each other": "expected at most 8 graphs or functions around a node of an ONNX model, got more; export",
    "a function that calls itself": "expected at most 8 graphs or functions around a node of an ONNX model, got more",
    "two inputs": "expected a file of one input",
    "a sequence of logits": "output logits: expected numbers, got seq(tensor(float))",
    "crop_pct: 0": "preprocessing.crop_pct: expected 0.05 to 1, got 0",
}


@pytest.mark.parametrize("name", WORDS)
def test_what_the_sentence_says(good, readers, tmp_path, name):
    (tmp_path / "folder").mkdir()
    accepted, text = said(readers[2], CASES[name](good, tmp_path / "folder"))
    assert not accepted
    assert WORDS[name] in text


@pytest.mark.parametrize("depth", [1, 8])
def test_branches_as_models_have_them_are_read(good, tmp_path, depth):
    accepted, text = said(lambda path: repr(load_file(path)), nested(depth)(good, tmp_path))
    assert accepted, text
    assert not said(lambda path: repr(load_file(path)), nested(9)(good, tmp_path))[0]


def test_a_file_of_another_model_does_not_fit(good, readers, tmp_path):
    (tmp_path / "folder").mkdir()
    accepted, text = said(readers[3], CASES["seven classes"](good, tmp_path / "folder"))
    assert not accepted
    assert "output logits: expected the model's shape (4, 5), got (4, 7); pass the file" in text


@pytest.mark.parametrize(
    "name", ["names that a terminal obeys", *(f"metadata: what a {o}" for o in ("terminal obeys", "console styles"))]
)
def test_the_command_line_shows_what_it_does_not_obey(good, tmp_path, name):
    (tmp_path / "folder").mkdir()
    path = CASES[name](good, tmp_path / "folder")
    for options in ([], ["--json"]):
        printed = CliRunner().invoke(app, ["inspect", str(path), *options])
        assert printed.exit_code == 0, printed.output
        assert printed.output.replace("\n", "").isprintable()
        assert EVIL not in printed.output
    assert ("[bold]" in printed.output and ":bomb:" in printed.output) == ("console" in name)
