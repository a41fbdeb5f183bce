"""Steps over ONNX models: each says what it did, or why nothing, and one that leaves an illegal graph is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from timm.models.vision_transformer import VisionTransformer

import ptq4vit_fx as ptq
from ptq4vit_fx.export.contract import Rewrite, Target, rewrite, run_steps
from ptq4vit_fx.export.model_files import load_file, message_of
from ptq4vit_fx.export.nodes import add_constant, new_node
from ptq4vit_fx.export.onnx_export import STEPS
from ptq4vit_fx.export.targets import TARGETS


def model_of():
    """Return x -> Relu -> Add of a constant -> y."""
    x, one = ir.val("x", ir.DataType.FLOAT, [2]), ir.val("one", const_value=ir.Tensor(np.ones(2, np.float32)))
    relu = ir.node("Relu", [x], outputs=[ir.val("r", ir.DataType.FLOAT, [2])], name="relu")
    add = ir.node("Add", [relu.outputs[0], one], outputs=[ir.val("y", ir.DataType.FLOAT, [2])], name="add")
    graph = ir.Graph([x], add.outputs, nodes=[relu, add], initializers=[one], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


@rewrite(nothing="no Add is left")
def add_to_subtract(model):
    found = [node for node in model.graph if node.op_type == "Add"]
    for node in found:
        node.op_type = "Sub"
    return len(found)


def test_a_step_says_what_it_did_and_then_why_nothing():
    model = model_of()
    assert add_to_subtract(model) == Rewrite("add_to_subtract", 1)
    again = add_to_subtract(model)
    assert (again.count, str(again)) == (0, "add_to_subtract: nothing, no Add is left")


def test_what_nobody_reads_any_more_is_removed():
    @rewrite(nothing="")
    def skip_relu(model):
        model.graph.node("relu").outputs[0].replace_all_uses_with(model.graph.inputs[0])
        model.graph.node("add").replace_input_with(1, model.graph.inputs[0])
        return 1

    model = model_of()
    skip_relu(model)
    assert [node.name for node in model.graph] == ["add"]
    assert not model.graph.initializers


def read_what_nobody_makes(model):
    model.graph.node("add").replace_input_with(1, ir.val("lost", ir.DataType.FLOAT, [2]))


def read_before_it_is_made(model):
    relu = model.graph.node("relu")
    model.graph.remove(relu)
    model.graph.append(relu)


def remove_what_is_read(model):
    model.graph.remove(model.graph.node("relu"))


def leave_a_reader_behind(model):
    new_node("Neg", [model.graph.inputs[0]], "n", "outside")


def name_a_node_twice(model):
    model.graph.node("add").name = "relu"


def name_a_tensor_twice(model):
    model.graph.node("relu").outputs[0].name = "x"


def change_a_type_alone(model):
    model.graph.initializers["one"].type = ir.TensorType(ir.DataType.INT8)


def forget_an_output(model):
    model.graph.outputs.append(ir.val("z", ir.DataType.FLOAT, [2]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (read_what_nobody_makes, "lost, which node add reads and no node in front makes"),
        (read_before_it_is_made, "r, which node add reads and no node in front makes"),
        (remove_what_is_read, "r, which node add reads and no node in front makes"),
        (leave_a_reader_behind, "x, whose reader outside is not in the graph"),
        (name_a_node_twice, "the name relu twice"),
        (name_a_tensor_twice, "the tensor x twice"),
        (change_a_type_alone, "constant one without a tensor of its type"),
        (forget_an_output, "output z, which no node makes"),
    ],
)
@pytest.mark.parametrize("count", [0, 1])
def test_a_step_that_leaves_an_illegal_graph_is_named(change, problem, count):
    def broken_step(model):
        change(model)
        return count

    with pytest.raises(ptq.PTQError) as caught:
        rewrite(nothing="nothing to break")(broken_step)(model_of())
    expected = f"export_onnx: step broken_step: expected a legal graph, got {problem}; report this as a bug"
    assert str(caught.value) == expected


def test_names_that_another_program_repeats_are_no_fault_of_a_step():
    model = model_of()
    name_a_node_twice(model)
    assert add_to_subtract(model).count == 1


def test_a_constant_is_added_once_and_no_other_under_its_name():
    model, values = model_of(), np.array([1, 2], np.int8)
    added = add_constant(model, "codes", values)
    assert add_constant(model, "codes", values.copy()) is added
    for other in (values + 1, values.astype(np.uint8), values[:1]):
        with pytest.raises(ptq.PTQError, match="constant codes: expected one meaning of every name"):
            add_constant(model, "codes", other)


def test_steps_get_what_their_parameters_name():
    @rewrite(nothing="")
    def add_opset(model, opset):
        add_constant(model, "opset", np.array(opset))
        model.graph.node("add").replace_input_with(1, model.graph.initializers["opset"])
        return 1

    model = model_of()
    done = run_steps(model, (add_opset, add_to_subtract), plan=None, opset=19)
    assert [(step.name, step.count) for step in done] == [("add_opset", 1), ("add_to_subtract", 1)]
    assert model.graph.initializers["opset"].const_value.numpy() == 19


def test_a_copy_is_the_callers_own():
    model = model_of()
    before = message_of(model)
    copy = model.clone()
    add_to_subtract(copy)
    assert message_of(model) == before
    assert message_of(copy) != before


@pytest.fixture(scope="module")
def converted(small_images):
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5)
    return ptq.quantize(model.eval(), small_images, progress=False)


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-arm", "openvino", "generic"])
def test_a_report_lists_every_step_with_a_count_or_a_reason(tmp_path, converted, small_images, target):
    report = ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target=target)
    steps = (*STEPS, *TARGETS[target].steps)
    assert [done.name for done in report.rewrites] == [step.name for step in steps]
    assert all(bool(done.count) != bool(done.reason) for done in report.rewrites)
    done = {step.name: step for step in report.rewrites}
    assert done["to_opset"].reason == "the exporter writes this opset itself"
    assert done["own_parameters"].count > report.sites  # both nodes of an activation, and two branches of a twin
    if target == "onnxruntime":
        assert done["split_projections"].count == 1
        assert done["to_integer_products"].count == report.operators["MatMulInteger"]


def test_a_target_is_steps_and_a_check(tmp_path, monkeypatch, converted, small_images):
    seen: list[Any] = []
    monkeypatch.setitem(TARGETS, "mine", Target("mine", (add_to_subtract,), seen.append))
    path = tmp_path / "model.onnx"
    report = ptq.export_onnx(converted, path, small_images[:1], target="mine")
    assert report.rewrites[-1].name == "add_to_subtract"
    assert report.operators["Sub"] == report.rewrites[-1].count + 1  # and one that a softmax twin has
    assert seen[0].graph.inputs[0].name == "image"
    assert load_file(path).metadata_props["ptq4vit_fx.target"] == "mine"
