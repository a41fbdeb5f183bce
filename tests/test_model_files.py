"""Files above protobuf's limit: written beside a data file, read where they lie, and no model loses its weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import ptq4vit_fx as ptq
from ptq4vit_fx.export import model_files
from ptq4vit_fx.export.model_files import data_files, load_file, message_of, write_model
from ptq4vit_fx.export.nodes import array
from ptq4vit_fx.export.proof.runtime import open_model, optimized

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
