"""Files above protobuf's limit: written beside a data file, read where they lie, and no model loses its weights."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import ptq4vit_fx as ptq
from ptq4vit_fx.export import model_files
from ptq4vit_fx.export.model_files import data_files, load_file, message_of, write_model
from ptq4vit_fx.export.nodes import array
from ptq4vit_fx.export.proof.runtime import open_model, optimized
from ptq4vit_fx.files import move

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def two_products():
    """Return x @ first @ second + bias -> y; the bias is the small one."""
    random = np.random.default_rng(0)
    shapes = {"first": (3, 40), "second": (40, 5), "bias": (5,)}
    stored = {n: ir.val(n, const_value=ir.Tensor(random.random(s, np.float32))) for n, s in shapes.items()}
    x = ir.val("x", ir.DataType.FLOAT, ["n", 3])
    one = ir.node("MatMul", [x, stored["first"]], name="one")
    two = ir.node("MatMul", [one.outputs[0], stored["second"]], name="two")
    y = ir.val("y", ir.DataType.FLOAT, ["n", 5])
    add = ir.node("Add", [two.outputs[0], stored["bias"]], outputs=[y], name="add")
    graph = ir.Graph(
        [x], [y], nodes=[one, two, add], initializers=list(stored.values()), opset_imports={"": 20}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(model_files, "PROTOBUF_LIMIT", 100)
    monkeypatch.setattr(model_files, "INLINE_BYTES", 64)


def test_no_model_loses_its_weights(tmp_path, small_limit):
    model = two_products()
    before = message_of(model)
    (expected,) = open_model(model).run(None, {"x": X})
    write_model(model, tmp_path / "model.onnx", "test")
    assert {node.op_type for node in optimized(model).graph} >= {"MatMul"}
    assert message_of(model) == before
    read = load_file(tmp_path / "model.onnx")
    for _ in range(2):  # opening a model that lies in a file takes nothing from it either
        np.testing.assert_array_equal(open_model(read).run(None, {"x": X})[0], expected)
    assert message_of(read).graph.initializer == before.graph.initializer


def test_large_tensors_start_at_a_page_and_small_ones_are_in_the_file(tmp_path, small_limit):
    write_model(two_products(), tmp_path / "model.onnx", "test")
    (data,) = data_files(tmp_path / "model.onnx")
    stored = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    places = {t.name: {entry.key: entry.value for entry in t.external_data} for t in stored}
    assert places["first"] == {"location": data.name, "offset": "0", "length": "480"}
    assert places["second"] == {"location": data.name, "offset": "4096", "length": "800"}
    assert places["bias"] == {}
    assert np.array_equal(array(load_file(tmp_path / "model.onnx").graph.initializers["first"]), first())


def first():
    return array(two_products().graph.initializers["first"])


def test_a_file_from_a_data_file_can_be_written_whole_again(tmp_path, small_limit, monkeypatch):
    write_model(two_products(), tmp_path / "model.onnx", "test")
    monkeypatch.setattr(model_files, "PROTOBUF_LIMIT", 2**30)
    write_model(load_file(tmp_path / "model.onnx"), tmp_path / "whole.onnx", "test")
    assert not data_files(tmp_path / "whole.onnx")
    assert onnx.load(tmp_path / "whole.onnx").graph.initializer == message_of(two_products()).graph.initializer


@pytest.mark.parametrize("kept", [0, 4500])
def test_a_data_file_that_was_cut_is_refused_when_it_is_read(tmp_path, small_limit, kept):
    write_model(two_products(), tmp_path / "model.onnx", "test")
    (data,) = data_files(tmp_path / "model.onnx")
    data.write_bytes(data.read_bytes()[:kept])
    with pytest.raises(ptq.PTQError, match=r"read ONNX file: .*model\.onnx: .*ends in front of byte"):
        load_file(tmp_path / "model.onnx")


def model_of(value):
    """Return the two products with other weights."""
    model = two_products()
    first = model.graph.initializers["first"]
    first.const_value = ir.Tensor(np.full((3, 40), value, np.float32))
    return model


def test_writers_of_one_path_beside_each_other_all_end_and_leave_one_model(tmp_path, small_limit):
    path = tmp_path / "model.onnx"
    models = [model_of(value) for value in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda model: [write_model(model, path, "test") for _ in range(8)], models))
    values = array(load_file(path).graph.initializers["first"])
    assert set(values.flat) in [{float(value)} for value in range(6)]
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", next(iter(data_files(path))).name}


def test_a_writer_waits_while_another_has_moved_its_weights_but_not_its_model(tmp_path, small_limit, monkeypatch):
    path = tmp_path / "model.onnx"
    others: list[Thread] = []
    second = Thread(target=write_model, args=(model_of(2), path, "test"))

    def moving(source, target):
        if not others:
            others.append(second)
            move(source, target)
            second.start()
            second.join(1.0)  # it cannot end before this writer has
            assert second.is_alive()
            return
        move(source, target)

    monkeypatch.setattr(model_files, "move", moving)
    write_model(model_of(1), path, "test")
    second.join()
    assert set(array(load_file(path).graph.initializers["first"]).flat) == {2.0}
    assert len(data_files(path)) == 1


def test_a_model_that_cannot_be_moved_leaves_the_old_one_with_its_weights(tmp_path, small_limit, monkeypatch):
    path = tmp_path / "model.onnx"
    write_model(model_of(1), path, "test")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real = os.replace

    def replace(source, target):
        if Path(target) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for model in (model_of(2), model_of(1)):
        with pytest.raises(ptq.PTQError, match=r"^test: .*model\.onnx: expected .*Input/output error"):
            write_model(model, path, "test")
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_data_files_lie_beside_what_a_link_leads_to(tmp_path, small_limit):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.onnx").symlink_to("there/model.onnx")
    write_model(model_of(1), tmp_path / "link.onnx", "test")
    assert (tmp_path / "link.onnx").is_symlink()
    (data,) = data_files(tmp_path / "there" / "model.onnx")
    assert {file.name for file in (tmp_path / "there").iterdir()} == {"model.onnx", data.name}
    for path in ("link.onnx", "there/model.onnx"):
        assert set(array(load_file(tmp_path / path).graph.initializers["first"]).flat) == {1.0}


def test_a_data_file_has_room_for_its_name(tmp_path, small_limit):
    for name in ("x" * 233, "y" * 234, "z" * 255):
        path = tmp_path / name
        for value in (1, 2):
            write_model(model_of(value), path, "test")
            assert set(array(load_file(path).graph.initializers["first"]).flat) == {float(value)}
        (data,) = data_files(path)
        assert len(os.fsencode(data.name)) <= 255
    assert len(list(tmp_path.iterdir())) == 6


KILLED = """
import itertools, sys
sys.path.insert(0, {tests!r})
import test_model_files as here
from ptq4vit_fx.export import model_files
model_files.PROTOBUF_LIMIT, model_files.INLINE_BYTES = 100, 64
models = [here.model_of(value) for value in range(3)]
for number in itertools.count():
    model_files.write_model(models[number % 3], {path!r}, "test")
    number or print(flush=True)
"""


def kill_writers(folder, delays):
    path = folder / "model.onnx"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    for delay in delays:
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        assert len(set(array(load_file(path).graph.initializers["first"]).flat)) == 1
    write_model(model_of(1), path, "test")
    assert {file.name for file in folder.iterdir()} == {"model.onnx", *(file.name for file in data_files(path))}
    assert len(data_files(path)) == 1


def test_a_writer_killed_anywhere_leaves_a_model_with_its_weights(tmp_path, small_limit):
    kill_writers(tmp_path, [0.001, 0.004])


@pytest.mark.sweep
def test_writers_killed_at_many_places_leave_a_model_with_its_weights(tmp_path, small_limit):
    kill_writers(tmp_path, np.random.default_rng(0).uniform(0, 0.03, 20))


def test_a_temporary_folder_without_room_is_a_sentence(tmp_path, small_limit, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real = Path.write_bytes

    def full(path, data):
        if path.suffix == ".onnx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        ptq.PTQError, match=r"expected room for .* bytes, got No space left .*or set TMPDIR to a folder"
    ):
        open_model(two_products())
    assert not list(tmp_path.iterdir())
