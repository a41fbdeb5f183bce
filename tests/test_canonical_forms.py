"""Passes towards one canonical form: each fires, leaves its near miss alone, and changes no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import count, model_of
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.canonicalize import canonicalize
from ptq4vit_fx.passes.fold_constants import FOLDED_LAYERS, fold_constants
from ptq4vit_fx.passes.from_aten import from_aten
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.marks import kind_of
from ptq4vit_fx.passes.graph.shapes import dtype_of, record_shapes, shape_of
from ptq4vit_fx.passes.multiply_in_float32 import multiply_in_float32
from ptq4vit_fx.passes.open_einsum import open_einsum
from ptq4vit_fx.passes.open_vector_products import open_vector_products
from ptq4vit_fx.passes.replace_in_place import replace_in_place
from ptq4vit_fx.passes.slice_pieces import slice_pieces
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.passes.trace_by_export import trace_by_export

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def targets(graph_module):
    return [node.target for node in graph_module.graph.nodes]


def exported(model):
    """A graph of torch.export at the stage that trace leaves."""
    graph_module = trace(nn.Identity())
    by_export = trace_by_export(model, (X,))
    by_export.meta.update(graph_module.meta)
    return by_export


ATEN: dict[str, Any] = {
    "linear": (lambda m, x: m.a(x), {"a": nn.Linear(8, 4)}, F.linear),
    "conv": (lambda m, x: m.a(x), {"a": nn.Conv2d(3, 4, 3, padding=1)}, F.conv2d),
    "conv, padding by name": (lambda m, x: m.a(x), {"a": nn.Conv2d(3, 4, 3, padding="same")}, F.conv2d),
    "matmul": (lambda m, x: x @ x, {}, torch.matmul),
    "bmm": (lambda m, x: torch.bmm(x[:, 0], x[:, 1]), {}, torch.matmul),
    "einsum": (lambda m, x: torch.einsum("bcij,bcjk->bcik", x, x), {}, torch.einsum),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), {}, F.scaled_dot_product_attention),
    "softmax": (lambda m, x: x.softmax(-1), {}, F.softmax),
    "gelu": (lambda m, x: F.gelu(x, approximate="tanh"), {}, F.gelu),
    "silu in place": (lambda m, x: F.silu(x + 1, inplace=True), {}, F.silu),
    "relu6": (lambda m, x: F.relu6(x), {}, F.relu6),
    "layer norm": (lambda m, x: m.a(x), {"a": nn.LayerNorm(8)}, F.layer_norm),
    "dropout": (lambda m, x: F.dropout(x, 0.5, training=False) + 0, {}, F.dropout),
}


@pytest.mark.parametrize("case", ATEN)
def test_from_aten(case):
    function, modules, target = ATEN[case]
    model = model_of(function, **modules)
    graph = exported(model)
    from_aten(graph)
    assert target in targets(graph)
    assert count(graph) >= 1
    for batch in (1, 2):
        assert torch.equal(graph(X[:batch]), model(X[:batch]))


@pytest.mark.parametrize(
    "function",
    [lambda m, x: x.softmax(-1, dtype=torch.float64), lambda m, x: F.hardtanh(x), lambda m, x: x.log_softmax(-1)],
    ids=["softmax in float64", "hardtanh that is not relu6", "log softmax"],
)
def test_from_aten_leaves_near_misses_alone(function):
    graph = exported(model_of(function))
    from_aten(graph)
    assert count(graph) == 0


def recorded(model):
    graph = trace(model)
    record_shapes(graph, (X,))
    return graph


EINSUMS = {
    "attention": ("bhqd,bhkd->bhqk", lambda x: (x, x)),
    "values": ("bhqk,bhkd->bqhd", lambda x: (x, x)),
    "two summed": ("bchw,bcxw->bhx", lambda x: (x, x)),
    "two on the left": ("bchw,bdw->bchd", lambda x: (x, x[:, 0])),
    "two on the right, the batch inside": ("wd,bchw->dbch", lambda x: (x[0, 0], x)),
    "vector": ("bchw,bw->bch", lambda x: (x, x[:, 0, 0])),
    "ellipsis": ("...ij,...kj->...ik", lambda x: (x, x)),
}


@pytest.mark.parametrize("case", EINSUMS)
def test_open_einsum(case):
    equation, operands = EINSUMS[case]
    graph = recorded(model_of(lambda m, x: torch.einsum(equation, *operands(x))))
    open_einsum(graph)
    assert count(graph) == 1
    assert torch.matmul in targets(graph)
    for batch in (1, 2):
        expected = torch.einsum(equation, *operands(X[:batch]))
        torch.testing.assert_close(graph(X[:batch]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "operands"),
    [
        ("bij,bjk,bkl->bil", lambda x: (x[:, 0], x[:, 1], x[:, 2])),
        ("bii,bij->bj", lambda x: (x[:, 0], x[:, 1])),
        ("bij,bkl->bik", lambda x: (x[:, 0], x[:, 1])),
        ("bij,bij->bij", lambda x: (x[:, 0], x[:, 1])),
        ("bij,bjk->bik", lambda x: (x[:, 0, :, :1], x[:, 1])),
    ],
    ids=["three operands", "diagonal", "summed within one operand", "no sum", "broadcast"],
)
def test_open_einsum_leaves_near_misses_alone(equation, operands):
    graph = recorded(model_of(lambda m, x: torch.einsum(equation, *operands(x))))
    open_einsum(graph)
    assert count(graph) == 0


UNCOUNTED: dict[str, Any] = {
    "LSTM": (lambda m, x: m.a(x[:, 0])[0], {"a": nn.LSTM(8, 4, batch_first=True)}),
    "GRU": (lambda m, x: m.a(x[:, 0])[0], {"a": nn.GRU(8, 4, batch_first=True)}),
    "Bilinear": (lambda m, x: m.a(x, x), {"a": nn.Bilinear(8, 8, 4)}),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.w), {"w": nn.Parameter(torch.randn(4, 8, 8))}),
    "cdist": (lambda m, x: torch.cdist(x, m.w), {"w": nn.Parameter(torch.randn(3, 5, 8))}),
    "cdist by matmul": (lambda m, x: torch.cdist(x, m.w), {"w": nn.Parameter(torch.randn(3, 40, 8))}),
    "addmv": (lambda m, x: torch.addmv(m.w, x[0, 0], m.w), {"w": nn.Parameter(torch.randn(8))}),
    "addbmm": (lambda m, x: torch.addbmm(m.w, x[:, 0], x[:, 1]), {"w": nn.Parameter(torch.randn(8, 8))}),
    "inverse": (lambda m, x: torch.linalg.solve(x @ x.mT + torch.eye(8), x), {}),
}


@pytest.mark.parametrize("case", UNCOUNTED)
def test_products_of_no_two_matrices_are_listed_as_float(case):
    function, modules = UNCOUNTED[case]
    model = model_of(lambda m, x: function(m, m.first(x)), first=nn.Linear(8, 8), **modules)
    with pytest.warns(ptq.PTQWarning, match="is not supported"):
        plan = plan_of(ptq.prepare_fx(model, ptq.recipes.ptq4vit(), X))
    assert len(plan.float_ops) == 1


def test_a_padding_mode_is_named_as_the_reason():
    convolution = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    model = model_of(lambda m, x: m.b(m.a(x)), a=convolution, b=nn.Conv2d(4, 4, 3))
    with pytest.warns(ptq.PTQWarning, match="a stays float: Conv2d with padding_mode='reflect' .write the padding"):
        plan = plan_of(ptq.prepare_fx(model, ptq.recipes.ptq4vit(), X))
    assert [op.name for op in plan.ops] == ["b"]


def test_distances_without_a_product_are_no_product():
    model = model_of(lambda m, x: torch.cdist(m.first(x), x, p=1.0), first=nn.Linear(8, 8))
    assert not plan_of(ptq.prepare_fx(model, ptq.recipes.ptq4vit(), X)).float_ops


U = torch.randn(8, generator=torch.Generator().manual_seed(2))
VECTORS = {
    "column": lambda m, x: x @ m.u,
    "row": lambda m, x: m.u @ x,
    "both": lambda m, x: x.mean((0, 1, 2)) @ m.u,
    "named": lambda m, x: torch.matmul(input=x, other=m.u),
    "mv": lambda m, x: torch.mv(x[0, 0], m.u) + x[0, 0].mv(m.u),
    "mv, named": lambda m, x: torch.mv(input=x[0, 0], vec=m.u),
    "dot": lambda m, x: torch.dot(m.u, x[0, 0, 0]) + m.u.dot(x[0, 0, 1]),
    "aten": lambda m, x: torch.ops.aten.mv.default(x[0, 0], m.u),
    "rmatmul": lambda m, x: x[0, 0].__matmul__(m.u),
}


@pytest.mark.parametrize("case", VECTORS)
def test_open_vector_products(case):
    graph = recorded(model_of(VECTORS[case], u=nn.Parameter(U)))
    expected = graph(X)
    open_vector_products(graph)
    assert count(graph) >= 1
    products = [node for node in graph.graph.nodes if node.target is torch.matmul]
    assert products
    assert all(len(shape_of(operand)) >= 2 for node in products for operand in node.all_input_nodes)
    torch.testing.assert_close(graph(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [lambda m, x: x @ x, lambda m, x: x * m.u, lambda m, x: torch.outer(m.u, m.u) + x])
def test_open_vector_products_leaves_matrices_alone(function):
    graph = recorded(model_of(function, u=nn.Parameter(U)))
    open_vector_products(graph)
    assert count(graph) == 0


def test_an_einsum_that_stays_is_listed_as_float():
    model = model_of(lambda m, x: torch.einsum("bij,bjk,bkl->bil", x[:, 0], m.a(x[:, 1]), x[:, 2]), a=nn.Linear(8, 8))
    with pytest.warns(ptq.PTQWarning, match="einsum is not supported"):
        plan = ptq.prepare_fx(model, ptq.recipes.ptq4vit(), X).plan
    assert [op.reason for op in plan.float_ops] == ["einsum is not supported"]


def add_then_use(m, x):
    y = x + 1
    y.add_(2)
    return y * 2


IN_PLACE = {
    "module": (lambda m, x: m.a(x + 1) * 2, {"a": nn.ReLU(inplace=True)}),
    "function": (lambda m, x: F.silu(x + 1, inplace=True) * 2, {}),
    "positional": (lambda m, x: F.relu(x + 1, True), {}),
    "method": (add_then_use, {}),
}


@pytest.mark.parametrize("tracer", [trace, exported], ids=["fx", "export"])
@pytest.mark.parametrize("case", IN_PLACE)
def test_replace_in_place(case, tracer):
    function, modules = IN_PLACE[case]
    model = model_of(function, **modules)
    graph = tracer(model)
    from_aten(graph)
    canonicalize(graph)
    replace_in_place(graph)
    assert count(graph) == 1
    assert not any("inplace" in node.kwargs or str(node.target).endswith("_") for node in graph.graph.nodes)
    assert torch.equal(graph(X.clone()), model(X.clone()))


def view_is_read_later(m, x):
    y = x + 1
    rows = y.flatten(1)
    y.mul_(2)
    return rows + 1


def part_is_written(m, x):
    y = x + 1
    y[:, 0].zero_()
    return y


@pytest.mark.parametrize("function", [view_is_read_later, part_is_written])
def test_replace_in_place_leaves_shared_memory_alone(function):
    model = model_of(function)
    graph = trace(model)
    canonicalize(graph)
    replace_in_place(graph)
    assert count(graph) == 0
    assert torch.equal(graph(X), model(X))


WRITING = {
    "a part": lambda m, x: x[:, 0].zero_() + x[:, 1],
    "a view that is read later": lambda m, x: x.flatten(1).mul_(2) + x.flatten(1),
    "where nothing is too large": lambda m, x: x[:, 0].clamp_(max=1e9) + x[:, 1],
    "through an attribute": lambda m, x: x.data[:, 0].zero_() + x[:, 1],
    "a result that is given": lambda m, x: torch.mul(x, 2, out=x) + 1,
}


@pytest.mark.parametrize("case", WRITING)
def test_a_graph_that_writes_into_its_input_reads_a_copy(case):
    graph, given = trace(model_of(WRITING[case])), X.clone()
    record_shapes(graph, (given,))
    assert torch.equal(given, X)
    canonicalize(graph)
    replace_in_place(graph)
    assert (count(graph), targets(graph).count(torch.clone)) == (1, 1)
    assert torch.equal(graph(given), WRITING[case](None, X.clone()))
    assert torch.equal(given, X)


def test_a_write_that_became_pure_needs_no_copy():
    graph = trace(model_of(lambda m, x: x.sub_(0.5).div_(2)))
    record_shapes(graph, (X,))
    canonicalize(graph)
    replace_in_place(graph)
    assert torch.clone not in targets(graph)
    assert torch.equal(graph(X.clone()), (X - 0.5) / 2)


def pieces_of(function):
    graph = recorded(model_of(function))
    for run in (canonicalize, replace_in_place, slice_pieces):
        run(graph)
    return graph


PIECES = {
    "chunk": lambda m, x: x.chunk(2, 1)[0].zero_() + x[:, :2],
    "the last of split": lambda m, x: x.split([1, 2], 1)[-1].mul_(2) + x[:, 1:],
    "unbind": lambda m, x: x.unbind(-1)[3].add_(1) + x[..., 3],
    "another view of a piece": lambda m, x: x.split(1, 1)[1].flatten(1).zero_().sum() + x,
    "a batch of two views": lambda m, x: torch.cat([x, x + 1]).chunk(2)[1],
}


@pytest.mark.parametrize("case", PIECES)
def test_slice_pieces(case):
    graph = pieces_of(PIECES[case])
    assert count(graph) == 1
    given = X.clone().requires_grad_()
    assert torch.equal(graph(given), PIECES[case](None, X.clone()))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.unbind(1)[0] * x.unbind(1)[1],
        lambda m, x: x.chunk(2, -1)[0].add(1),
        lambda m, x: torch.cat(x.chunk(2)),
        lambda m, x: x.split(1)[0],
    ],
    ids=["unbind", "no write", "all pieces together", "a number of pieces that depends on the batch"],
)
def test_slice_pieces_leaves_near_misses_alone(function):
    assert count(pieces_of(function)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_multiply_in_float32(dtype):
    graph = recorded(model_of(lambda m, x: m.a(x) @ (x.to(dtype) @ x.to(dtype)).float(), a=nn.Linear(8, 8)))
    canonicalize(graph)
    multiply_in_float32(graph)
    assert count(graph) == 1
    products = [node for node in graph.graph.nodes if kind_of(node) is not None]
    assert [dtype_of(node) for node in products] == [torch.float32] * 3
    product = next(node for node in graph.graph.nodes if node.args[1:] == (dtype,) and node.args[0] in products)
    assert dtype_of(product) == dtype


class Standardized(nn.Conv2d):
    """A convolution whose weight is computed from its parameter."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * 2
        return F.conv2d(x, weight, self.bias, padding=1)


def test_fold_constants_computes_weights_and_biases_once():
    table = nn.Linear(2, 8)
    grid = torch.arange(16.0).view(8, 2)
    model = model_of(lambda m, x: m.a(x) + m.table(grid).t(), a=Standardized(3, 4, 3), table=table)
    plan = ptq.prepare_fx(model, ptq.recipes.ptq4vit(), X).plan
    assert [(op.name, op.rhs_is_weight) for op in plan.ops] == [("a", True)]
    graph = trace(model)
    canonicalize(graph)
    fold_constants(graph)
    assert count(graph) == 2
    assert graph.meta[FOLDED_LAYERS] == ("table",)
    assert F.linear not in targets(graph)
    assert torch.equal(graph(X), model(X))


def test_fold_constants_leaves_moved_parameters_and_the_batch_alone():
    model = model_of(lambda m, x: m.a(x) + m.a.bias.view(1, 1, 1, -1).expand(x.shape[0], -1, -1, -1), a=nn.Linear(8, 8))
    graph = trace(model)
    canonicalize(graph)
    fold_constants(graph)
    assert count(graph) == 0
    for batch in (1, 2):
        assert torch.equal(graph(X[:batch]), model(X[:batch]))


def test_a_weight_that_depends_on_the_input_stays_float():
    model = model_of(lambda m, x: F.linear(m.a(x), x[0, 0]), a=nn.Linear(8, 8))
    with pytest.warns(ptq.PTQWarning, match="its weight depends on the input"):
        ptq.prepare_fx(model, ptq.recipes.ptq4vit(), X)
