"""Outputs of models and of their files: plain containers, names, and a comparison that sees each of them."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.export.interface import compute_outputs
from ptq4vit_fx.export.proof.comparison import compare, compare_outputs
from ptq4vit_fx.export.proof.outputs import Images
from ptq4vit_fx.passes.graph.outputs import plain_outputs, tensor_outputs

T = torch.zeros(2, 3)
Pair = namedtuple("Pair", ["boxes", "scores"])


@dataclass
class Found:
    logits: Any
    boxes: Any = None


OUTPUTS = [
    (T, torch.Tensor, ["logits"]),
    ({"logits": T, "loss": None}, torch.Tensor, ["logits"]),
    (Found(T), torch.Tensor, ["logits"]),
    (Found(T, T), dict, ["logits", "boxes"]),
    ({"out": T}, dict, ["out"]),
    ((T,), tuple, ["logits"]),
    ((T, None, T), tuple, ["output_0", "output_2"]),
    ([T, (T, T)], list, ["output_0", "output_1", "output_2"]),
    (Pair(T, (T, T)), Pair, ["boxes", "scores.0", "scores.1"]),
    ((T, {"boxes": T}), tuple, ["output_0", "output_1.boxes"]),
    ({"a": {"b": T, "n": 3}, "a.b": T, 4: T}, dict, ["a.b", "a.b_1", "4"]),
]


@pytest.mark.parametrize(("output", "kind", "names"), OUTPUTS)
def test_every_tensor_has_a_name(output, kind, names):
    plain = plain_outputs(output)
    assert type(plain) is kind
    assert list(tensor_outputs(plain)) == names
    assert all(x is T for x in tensor_outputs(plain).values())


def test_objects_are_left_out_aloud_and_alone_refused():
    with pytest.warns(ptq.PTQWarning, match=r"output past.1 is left out: object is no tensor"):
        assert plain_outputs({"logits": T, "past": [T, object()]}) == {"logits": T, "past": [T, None]}
    with pytest.raises(ptq.PTQError, match=r"the model's output: expected tensors.*an object of object"):
        plain_outputs(object())


def test_what_has_no_batch_is_every_images():
    images = Images("the model")
    for size in (2, 3):
        rows = {"logits": np.ones((size, 4)), "windows": np.ones((2 * size, 5)), "table": np.ones((6, 2))}
        images.add(rows | {"scale": np.float32(2)}, size, kept=min(size, 2))
    shapes = {name: rows.shape for name, rows in images.outputs().items()}
    assert shapes == {"logits": (4, 4), "windows": (4, 10), "table": (4, 1, 12), "scale": (4, 1, 1)}
    images.add({"logits": np.ones((2, 9))}, 2, 2)
    with pytest.raises(ptq.PTQError, match="output logits of the model: expected as many values for every image"):
        images._rows("logits")


def test_the_worst_output_is_what_counts():
    random = np.random.default_rng(0)
    mine = {"logits": random.normal(size=(4, 7)).astype(np.float32), "boxes": np.ones((4, 5, 4), np.float32)}
    theirs = mine | {"boxes": mine["boxes"].copy()}
    theirs["boxes"][2, :, 0] = 3
    found = compare_outputs(mine, theirs)
    assert (found.agreement, found.bit_equal, found.max_absolute_difference) == (1, 0.75, 2)
    assert found.cosine == compare(mine["boxes"], theirs["boxes"]).cosine < 0.9
    theirs = mine | {"best": mine["logits"].argmax(1) + 1}
    found = compare_outputs(mine | {"best": mine["logits"].argmax(1)}, theirs)
    assert found.bit_equal == 0
    assert found.cosine == pytest.approx(1)


def test_infinities_and_zeros_that_are_equal_are_no_difference():
    mask = np.array([[0, -np.inf, 1], [0, 0, 0]], np.float32)
    assert compare(mask, mask).cosine == pytest.approx(1)
    assert compare(mask, mask).bit_equal == 1
    assert compare(mask, np.zeros_like(mask)).max_absolute_difference == np.inf


def test_a_constant_output_is_made_by_a_node():
    table = ir.val("table", const_value=ir.Tensor(np.ones(2, np.float32)))
    double = ir.node("Add", [table, table], outputs=[ir.val("y", ir.DataType.FLOAT, [2])], name="double")
    outputs = [table, double.outputs[0], table]
    graph = ir.Graph([], outputs, nodes=[double], initializers=[table], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=9)
    assert compute_outputs(model).count == 2
    assert [value.name for value in graph.outputs] == ["table", "y", "table"]
    assert list(graph.initializers) == [table.name]
    assert double.inputs[0] is table


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.boxes, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return {"logits": self.head(x.mean(1)), "boxes": self.boxes(x)}


@pytest.fixture(scope="module")
def converted(small_images):
    torch.manual_seed(0)
    prepared = ptq.prepare_fx(Detector().eval(), ptq.recipes.ptq4vit().with_search(n=4, rounds=1), small_images[:1])
    ptq.calibrate(prepared, small_images, loss=lambda output: output["logits"].square().sum(), progress=False)
    return ptq.convert_fx(prepared)


def test_a_wrong_output_is_named(tmp_path, converted, small_images):
    path = tmp_path / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1])
    assert set(ptq.verify_onnx(path, converted, small_images).outputs) == {"logits", "boxes"}
    model = onnx.load(path)
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "boxes.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(model, path)
    report = ptq.verify_onnx(path, converted, small_images)
    assert report.outputs["logits"].bit_equal > 0.9
    assert report.outputs["boxes"].max_absolute_difference == pytest.approx(1, rel=1e-3)
    assert "output boxes: bit-equal 0.00%, largest difference 1," in str(report)


def test_chosen_and_renamed_outputs_are_compared_with_their_own(tmp_path, converted, small_images):
    for names in (["boxes"], ["boxes", "logits"], ["classes", "where"]):
        path = tmp_path / "model.onnx"
        ptq.export_onnx(converted, path, small_images[:1], output_names=names)
        assert [value.name for value in onnx.load(path).graph.output] == names
        report = ptq.verify_onnx(path, converted, small_images)
        assert set(report.outputs) == ({"boxes"} if len(names) == 1 else {"logits", "boxes"})
        assert report.simulation.cosine > 0.999


@pytest.mark.parametrize("names", [["boxes", "logit"], ["boxes", "boxes"], ["boxes", ""], [], "boxes,logits"])
def test_names_that_fit_no_output_are_refused(tmp_path, converted, small_images, names):
    with pytest.raises(ptq.PTQError, match=r"output_names|names that differ"):
        ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], output_names=names)


def test_the_batch_is_called_so(tmp_path, converted, small_images):
    ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1])
    model = onnx.load(tmp_path / "model.onnx")
    shapes = [value.type.tensor_type.shape for value in (*model.graph.input, *model.graph.output)]
    assert [shape.dim[0].dim_param for shape in shapes] == ["batch"] * 3
    assert "s77" not in str(model.graph.value_info)


def test_a_file_that_does_not_run_says_where_and_of_another_size_what_it_takes(tmp_path, converted, small_images):
    path = tmp_path / "model.onnx"
    ptq.export_onnx(converted, path, small_images[:1])
    model = onnx.load(path)
    reshape = next(node for node in model.graph.node if node.name == "patch/Reshape")
    (sizes,) = (tensor for tensor in model.graph.initializer if tensor.name == reshape.input[1])
    sizes.CopyFrom(numpy_helper.from_array(np.array([2, 3, 4, 4, 4, 4]), sizes.name))
    onnx.save(model, path)
    runs = r"a file that runs on inputs \(3, 3, 16, 16\), got .*patch/Reshape.*; look at that node"
    with pytest.raises(ptq.PTQError, match=runs):
        ptq.verify_onnx(path, converted, small_images[:3], layers=0)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 8
    onnx.save(model, path)
    takes = r"expected inputs of shape image \['batch', 3, 8, 16\].*of the size that was exported"
    with pytest.raises(ptq.PTQError, match=takes):
        ptq.verify_onnx(path, converted, small_images[:2], layers=0)
