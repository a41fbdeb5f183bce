"""Products become MatMulInteger for ONNX Runtime, which fuses what is behind them, and DequantizeLinear again."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from graphs import model_of
from onnx.reference import ReferenceEvaluator
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.export.contract import Rewrite
from ptq4vit_fx.export.integer_products import in_qdq_form, integer_products, to_integer_products, to_qdq_products
from ptq4vit_fx.export.model_files import load_file, message_of
from ptq4vit_fx.export.nodes import array, set_constant
from ptq4vit_fx.export.proof.runtime import open_model, open_session, optimized
from ptq4vit_fx.export.proof.runtime_graph import runtime_graph
from ptq4vit_fx.export.stored_sites import stored_sites

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def mlp(module, x):
    return module.second(F.gelu(module.first(x.flatten(2) + 1.0))).flatten(1)


def layers(bias=True, columns=5):
    return {"first": nn.Linear(16, 12, bias), "second": nn.Linear(12, columns, bias)}


def file_of(tmp_path, function, target="onnxruntime", twins="exact", batch=None, weights="channel", **modules):
    torch.manual_seed(0)
    recipe = ptq.recipes.ptq4vit(8, 8, weights, twins=twins).with_search(n=4, rounds=1)
    prepared = ptq.prepare_fx(model_of(function, **modules), recipe, X)
    ptq.calibrate(prepared, X, progress=False)
    converted = ptq.convert_fx(prepared)
    ptq.export_onnx(converted, tmp_path / "model.onnx", X, target=target, batch=batch)
    return tmp_path / "model.onnx", converted


def biases(model):
    """Names of what ONNX Runtime hands to its integer products as biases."""
    fused = [node for node in optimized(model).graph if node.op_type == "MatMulIntegerToFloat"]
    return [node.inputs[6].name for node in fused if len(node.inputs) > 6]


def nodes_of(model, *kinds):
    return [node for node in model.graph if node.op_type in kinds]


def as_integer_products(model):
    copy = model.clone()
    assert to_integer_products(copy).count
    return copy


def plain_run(model, images=X):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return open_model(model, options=options).run(None, {"image": images.numpy()})[0]


def report_of(model, products):
    """Check that the file is valid and that its products, so many, run as integers; return what the runtime does."""
    onnx.checker.check_model(message_of(model), full_check=True)
    report = runtime_graph(model)
    assert len(report.integer_products) == products
    assert {name for name in report.integer_products if "Integer" in name} == {
        node.name for node in nodes_of(model, "MatMulInteger")
    }
    assert not report.float_products
    return report


def check_codes(path, converted, images):
    """Check that every site of the file has the codes and scales of the simulation, and so the logits every bit."""
    verified = ptq.verify_onnx(path, converted, images)
    assert verified.same_functions.bit_equal == 1.0
    assert all(site.equal == 1.0 and site.same_scale for site in verified.layers)
    assert not verified.code_comparison.missing


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-avx2", "onnxruntime-arm"])
@pytest.mark.parametrize(("twins", "products"), [("uniform", 2), ("exact", 3)])
@pytest.mark.parametrize("weights", ["channel", "group"])
def test_the_runtime_adds_the_bias_in_the_product(tmp_path, twins, products, target, weights):
    path, converted = file_of(tmp_path, mlp, target, twins, weights=weights, **layers())
    model = load_file(path)
    report = report_of(model, products)
    assert len(biases(model)) == 2
    assert not report.leftovers  # the scales are no pair that was left
    assert report.after["Add"] == 1 + products - 2  # in front, and the two halves of a twin
    check_codes(path, converted, X)


@pytest.mark.parametrize("twins", ["uniform", "exact"])
def test_dequantized_again_it_is_the_file_of_another_target(tmp_path, twins):
    path, converted = file_of(tmp_path, mlp, twins=twins, **layers())
    ptq.export_onnx(converted, tmp_path / "generic.onnx", X, target="generic")
    written, generic = load_file(path), load_file(tmp_path / "generic.onnx")
    back = in_qdq_form(written)

    def described(model):
        order = {"Add": sorted}  # the bias may stand on either side
        nodes = message_of(model).graph.node
        inputs = [order.get(node.op_type, list)(node.input) for node in nodes]
        return sorted((n.name, n.op_type, *x, *n.output) for n, x in zip(nodes, inputs, strict=True))

    assert described(back) == described(generic)
    assert set(back.graph.initializers) == set(generic.graph.initializers)
    assert len(written.graph) > len(back.graph)
    assert serialized(as_integer_products(back)) == serialized(written)
    assert message_of(in_qdq_form(generic)).graph.node == message_of(generic).graph.node
    assert "to_qdq_products: nothing, no product has the form" in str(to_qdq_products(generic))
    mine, theirs = stored_sites(written), stored_sites(generic)
    assert mine.keys() == theirs.keys()
    for site, stored in mine.items():
        assert np.array_equal(stored.scale, theirs[site].scale)
        assert np.array_equal(stored.zero_point, theirs[site].zero_point)
        assert (stored.codes is None) == (theirs[site].codes is None)
        if stored.codes is not None:
            np.testing.assert_array_equal(stored.codes, theirs[site].codes)


def serialized(model):
    return message_of(model).graph.SerializeToString(deterministic=True)


def test_the_operators_are_standard_ones(tmp_path):
    """Without the fusion, and by the specification's own evaluator, the file gives what the fused one does."""
    path, _ = file_of(tmp_path, lambda module, x: module.layer(x.flatten(1)), layer=nn.Linear(32, 5))
    (expected,) = open_session(path).run(None, {"image": X.numpy()})
    (got,) = ReferenceEvaluator(onnx.load(path)).run(None, {"image": X.numpy()})
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(plain_run(in_qdq_form(load_file(path))).round(4), expected.round(4))


def test_one_module_called_twice(tmp_path):
    path, converted = file_of(
        tmp_path, lambda module, x: module.layer(module.layer(x.flatten(1))), layer=nn.Linear(32, 32)
    )
    model = load_file(path)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert len(biases(model)) == len(list(integer_products(model))) == 2
    assert ptq.verify_onnx(path, converted, X).same_functions.bit_equal == 1.0


@pytest.mark.parametrize(
    ("function", "modules"),
    [
        (mlp, layers(bias=False)),
        (lambda module, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).flatten(1) + 1.0, {}),
        (lambda module, x: (module.layer(x.flatten(2)) + module.table.weight).amax(1), "table"),
        (lambda module, x: (s := F.linear(x.flatten(1), module.layer.weight)) + module.layer.bias + s.mean(), None),
    ],
    ids=["no bias", "two activations", "a table", "read elsewhere"],
)
def test_other_products_stay_as_they_are(tmp_path, function, modules):
    if modules is None:
        modules = {"layer": nn.Linear(32, 5)}
    elif modules == "table":  # one row per token, where a bias has one for all
        modules = {"layer": nn.Linear(16, 5, bias=False), "table": nn.Embedding(2, 5)}
    path, converted = file_of(tmp_path, function, **modules)
    model = load_file(path)
    assert not nodes_of(model, "MatMulInteger")
    assert [n.name for n in in_qdq_form(model).graph] == [n.name for n in model.graph]
    reason = "no product of codes has a bias or scales per head behind it that go into it"
    assert to_integer_products(model) == Rewrite("to_integer_products", 0, reason)
    assert ptq.verify_onnx(path, converted, X).same_functions.bit_equal == 1.0


def test_the_bias_may_stand_in_front(tmp_path):
    """Older versions of the runtime fuse it on the right alone."""
    model = in_qdq_form(load_file(file_of(tmp_path, mlp, **layers())[0]))
    expected = as_integer_products(model)
    for node in nodes_of(model, "Add"):
        for index, value in enumerate(node.inputs[::-1]):
            node.replace_input_with(index, value)
    written = [
        [list(node.input) for node in message_of(m).graph.node if node.input[-1] in ("first.bias", "second.bias")]
        for m in (expected, as_integer_products(model))
    ]
    assert len(written[0]) == 2
    assert written[0] == written[1]


def test_one_column_is_an_integer_product_whose_bias_is_added_behind(tmp_path):
    """The runtime fuses no bias of one element."""
    path, converted = file_of(tmp_path, mlp, twins="uniform", **layers(columns=1))
    assert len(biases(load_file(path))) == 1
    report = runtime_graph(load_file(path))
    assert "second/MatMulInteger" in report.integer_products
    assert ptq.verify_onnx(path, converted, X).same_functions.bit_equal == 1.0


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_fuses_too(tmp_path, batch):
    path, _ = file_of(tmp_path, mlp, batch=batch, **layers())
    assert len(biases(load_file(path))) == 2
    assert not runtime_graph(load_file(path)).float_products


HEADS, TOKENS, DIM = 2, 8, 4


def attention(module, x):
    return attend(module, x.reshape(-1, TOKENS, DIM)).transpose(1, 2).flatten(2).amax(1)


def two_windows(module, x):
    """Twice as many matrices as images."""
    return attend(module, x.reshape(-1, TOKENS // 2, DIM)).reshape(-1, 2, HEADS * TOKENS // 2 * DIM).amax(1)


def attend(module, tokens):
    q, k, v = (layer(tokens).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for layer in (module.q, module.k, module.v))
    return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


def projections():
    layers = {name: nn.Linear(DIM, HEADS * DIM) for name in "qkv"}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight[:DIM] *= 7.3  # so that the heads' scales differ
    return layers


def multiplied_behind(model):
    """Names of the products that ONNX Runtime multiplies by another tensor in a pass of its own."""
    made_by = [maker for node in nodes_of(optimized(model), "Mul") for maker in node.predecessors()]
    return [maker.name for maker in made_by if maker.op_type == "MatMulIntegerToFloat"]


@pytest.mark.parametrize("function", [attention, two_windows])
@pytest.mark.parametrize(("twins", "products"), [("uniform", 5), ("exact", 6)])
@pytest.mark.parametrize(
    ("target", "batch"),
    [
        *(("onnxruntime", batch) for batch in (None, 1, 3)),
        *(("onnxruntime-avx2", None), ("onnxruntime-arm", None)),
        *(
            pytest.param(f"onnxruntime-{cpu}", batch, marks=pytest.mark.sweep)
            for cpu in ("avx2", "arm")
            for batch in (1, 3)
        ),
    ],
)
def test_scales_per_head_are_in_the_product(tmp_path, target, twins, products, batch, function):
    path, converted = file_of(tmp_path, function, target, twins, batch, **projections())
    model = load_file(path)
    qdq = in_qdq_form(model)
    matmuls = {node.outputs[0] for node in nodes_of(qdq, "MatMul")}
    multiplied = [node for node in nodes_of(qdq, "Mul") if matmuls.intersection(node.inputs)]
    assert len(multiplied) == (2 if twins == "uniform" else 1)  # a twin's is behind the sum
    assert not multiplied_behind(model)
    report = report_of(model, products)
    assert target == "onnxruntime-arm" or not report.leftovers  # x86 moves no int8 code through a Transpose
    assert len(nodes_of(model, "MatMulInteger")) == 3 + len(multiplied)
    for images in [X[:batch]] if batch else [X[:1], X, torch.cat([X, X])]:
        (expected,) = open_model(qdq).run(None, {"image": images.numpy()})
        (got,) = open_model(model).run(None, {"image": images.numpy()})
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(plain_run(model, X[:batch]), plain_run(qdq, X[:batch]))
    check_codes(path, converted, X[:batch])


@pytest.mark.parametrize("twins", ["uniform", "exact"])
def test_scales_per_head_are_read_back(tmp_path, twins):
    path, converted = file_of(tmp_path, attention, twins=twins, **projections())
    ptq.export_onnx(converted, tmp_path / "generic.onnx", X, target="generic")
    written, generic = load_file(path), stored_sites(load_file(tmp_path / "generic.onnx"))
    assert serialized(as_integer_products(in_qdq_form(written))) == serialized(written)
    assert stored_sites(written).keys() == generic.keys()
    for site, stored in stored_sites(written).items():
        calibrated = stored.scale if stored.calibrated is None else stored.calibrated
        theirs = generic[site]
        np.testing.assert_array_equal(calibrated, theirs.scale if theirs.calibrated is None else theirs.calibrated)


def constants_of(model, ending):
    return [value for name, value in model.graph.initializers.items() if name.endswith(ending)]


def another_scale(model):
    for tensor in constants_of(model, ":rhs.scale"):
        if not array(tensor).ndim:
            set_constant(tensor, np.float32(0.3))


def a_scale_per_column(model):
    for tensor, columns in zip(constants_of(model, "output_head.scale"), (TOKENS, DIM), strict=True):
        set_constant(tensor, np.ones((HEADS, 1, columns), np.float32))


def no_shapes(model):
    for node in model.graph:
        node.outputs[0].shape = None


@pytest.mark.parametrize("change", [another_scale, a_scale_per_column, no_shapes])
def test_scales_per_head_stay_behind_where_they_cannot_go_in(tmp_path, change):
    """A rounding more, another number per column, or a shape that is not known."""
    model = in_qdq_form(load_file(file_of(tmp_path, attention, twins="uniform", **projections())[0]))
    assert len(multiplied_behind(model)) == 2
    change(model)
    assert len(multiplied_behind(as_integer_products(model))) == 2


@pytest.mark.parametrize(("scales", "tensors"), [((0.25, 0.25), 2), ((0.25, 0.5), 4)])
def test_equal_scales_are_expanded_once(tmp_path, scales, tensors):
    """To the columns of q @ k and of softmax @ v: two tensors if both attentions have equal scales."""

    def twice(module, x):
        first = attend(module, x.reshape(-1, TOKENS, DIM)).mean(1)
        return attend(module, first).transpose(1, 2).flatten(2).amax(1)

    model = in_qdq_form(load_file(file_of(tmp_path, twice, twins="uniform", **projections())[0]))
    for tensor in constants_of(model, ":rhs.scale"):
        if not array(tensor).ndim:
            set_constant(tensor, np.float32(scales[tensor.name.partition(":")[0].endswith("_1")]))
    expected = plain_run(model)
    written = as_integer_products(model)
    assert len(nodes_of(written, "Expand")) == tensors
    assert not multiplied_behind(written)
    np.testing.assert_allclose(plain_run(written), expected, rtol=1e-6)  # one sum in float, one of integers
