"""`eval` on the workers of an executor: what is counted is the same, whichever worker counted it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_executors import processes_of

import ptq4vit_fx as ptq
from ptq4vit_fx.tools.evaluation import evaluate_file
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tools.phases import Phases
from ptq4vit_fx.tools.shards import Opened, Question, ShardTask, SharedQuestion

IMAGES, CLASSES = 40, 5
MEAN_AND_STD = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}


@pytest.fixture(scope="module")
def question(tmp_path_factory, small_converted, small_images):
    """A file, and a folder of images, one of them broken."""
    folder = tmp_path_factory.mktemp("eval")
    ptq.export_onnx(small_converted, folder / "int8.onnx", small_images[:1], preprocessing=MEAN_AND_STD)
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / "images" / str(number % CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(place / f"{number}.png")
    (folder / "images" / "3" / "13.png").write_bytes(b"no picture")
    return Question(folder / "int8.onnx", folder / "images", batch_size=2)


@pytest.mark.parametrize("beside", [False, True])
def test_workers_count_what_this_process_counts(question, beside):
    if beside:
        question = replace(question, against=Asked(str(question.file)))
    here = evaluate_file(question, Phases(Console(quiet=True)))
    assert here.images == IMAGES - 1
    assert [name.partition(":")[0].rpartition("/")[2] for name in here.skipped] == ["13.png"]
    with ThreadPoolExecutor(3) as threads, processes_of(2) as processes:
        for executor in (threads, processes):
            assert evaluate_file(question, Phases(Console(quiet=True)), executor) == here


def test_pieces_are_whole_batches_and_every_image_once(question):
    opened = Opened(question)
    assert [number for piece in opened.pieces for number in piece] == list(range(IMAGES))
    assert {len(piece) % opened.batch for piece in opened.pieces[:-1]} == {0}
    assert len(opened.pieces) > 1
    seen = list[int]()
    shard = opened.shard(opened.pieces[-1], seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(opened.pieces[-1])
    assert shard.numbers == list(opened.pieces[-1])


def test_progress_ends_at_all_images(question):
    with ThreadPoolExecutor(2) as pool:
        for executor in (None, pool):
            phases, seen = Phases(Console(quiet=True)), list[int]()
            phases.show = lambda moment, seen=seen: seen.append(moment.done)  # type: ignore[assignment,misc]
            evaluate_file(question, phases, executor)
            assert seen[-1] == IMAGES


def test_a_worker_with_other_images_is_refused(question):
    task = ShardTask(range(32), IMAGES + 1)
    with pytest.raises(ptq.PTQError, match=r"images on worker .*: expected 41 images, as the client, got 40; give all"):
        task(SharedQuestion(question, "a"))


def test_an_error_on_a_worker_is_the_one_that_is_raised_here(question, tmp_path):
    (tmp_path / "one" / "99").mkdir(parents=True)
    (tmp_path / "one" / "99" / "a.png").write_bytes((question.data / "0" / "0.png").read_bytes())
    asked = Question(question.file, tmp_path / "one")
    said = []
    with ThreadPoolExecutor(1) as pool:
        for executor in (None, pool):
            with pytest.raises(ptq.PTQError, match="numbered up to 99") as caught:
                evaluate_file(asked, Phases(Console(quiet=True)), executor)
            said.append(str(caught.value))
    assert said[0] == said[1]


def test_paths_are_absolute_for_workers_in_another_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").touch()
    asked = Asked("net.py:Net", Path("w.safetensors"))
    found = Question(Path("m.onnx"), Path("a.npz:images"), "deit_tiny_patch16_224", against=asked).absolute()
    assert found.file == tmp_path / "m.onnx"
    assert found.data == tmp_path / "a.npz:images"
    assert found.model == "deit_tiny_patch16_224"
    assert found.against == Asked(f"{tmp_path}/net.py:Net", tmp_path / "w.safetensors")
