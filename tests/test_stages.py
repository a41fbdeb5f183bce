"""Each stage is a check: a graph that breaks one is refused by the name of the node and of the pass that broke it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import calibrated, model_of, two_blocks
from torch import nn
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.contract import graph_pass, stage_of
from ptq4vit_fx.passes.graph.marks import planned_product
from ptq4vit_fx.passes.graph.observer import ProductObserver
from ptq4vit_fx.passes.graph.operators import DEQUANTIZE, INTEGER_MATMUL
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.stages import Stage, check_stage, float_products
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.passes.write_qdq import write_qdq
from ptq4vit_fx.pipeline import CONVERSION, preparation

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def node_of(graph_module, target):
    return next(node for node in graph_module.graph.nodes if node.target in (target, str(target)))


def product(graph_module, name):
    return next(node for node in graph_module.graph.nodes if planned_product(node) == name)


def inserted_too_early(graph):
    graph.add_submodule("spy", ProductObserver("spy"))
    node = node_of(graph, "head")
    node.update_arg(0, Writer(node).module("spy", None, None, None, node.args[0]))


def product_by_name(graph):
    node = product(graph, "head")
    lhs, rhs, bias = node.args
    replace(node, Writer(node)(F.linear, lhs, rhs, bias=bias))


def without_observer(graph):
    node = product(graph, "blocks.0.fc1")
    (observer,) = node.users
    replace(observer, node)


def without_quantizer(graph):
    node = product(graph, "blocks.1.proj")
    node.update_arg(0, node.args[0].args[0])


def in_float_values(graph):
    node = product(graph, "blocks.1.proj")
    node.update_arg(0, node.args[0].args[0].args[0])


def unlisted(graph):
    node = product(graph, "blocks.0.fc1")
    lhs, rhs = (Writer(node, scope=f"blocks.0.fc1:{side}") for side in ("lhs", "rhs"))
    operands = [lhs(DEQUANTIZE, *node.args[:3], 0), rhs(DEQUANTIZE, *node.args[3:], 1)]
    replace(node, (made := Writer(node)(torch.matmul, *operands)), product=made)


def lost_product(graph):
    node = product(graph, "head")
    del node.meta["ptq4vit_op"]


def integers(graph):
    node = product(graph, "head")
    lhs, rhs = node.args
    replace(node, (made := Writer(node)(INTEGER_MATMUL, *lhs.args[:3], *rhs.args[:3])), product=made)


#: Stage -> the last pass in front of it, what breaks the graph there, and what the error says.
BROKEN = {
    Stage.TRACED: (None, inserted_too_early, r"node spy: .*got spy, which a later pass inserts"),
    Stage.CANONICAL: ("annotate", product_by_name, r"node linear\w*: .*got .*linear.*, which is no canonical call"),
    Stage.OBSERVED: ("insert_observers", without_observer, r"node blocks_0_fc1\w*: .*blocks.0.fc1 without an observer"),
    Stage.SIMULATED: ("insert_quantizers", without_quantizer, r"node blocks_1_proj\w*: .*operand flatten_2 of blocks"),
    Stage.LOWERED: ("lower_linears", in_float_values, r"node blocks_1_proj\w*: .*operand \w+ of blocks.1.proj is not"),
    Stage.CONVERTED: ("lower_products", unlisted, r"node \w+: .*got product blocks.0.fc1 in float, and not listed"),
    Stage.QDQ: ("write_qdq", integers, r"node \w+: .*got a product on integer codes"),
}


@pytest.fixture(scope="module")
def prepared():
    return calibrated(two_blocks(), X)


def graph_at(stage: Stage, last: str | None, prepared: GraphModule) -> GraphModule:
    graph = trace(two_blocks(), (X[:1],))
    preparing = preparation(ptq.recipes.ptq4vit())
    if last is None:
        return graph
    if last in [step.name for step in preparing.steps]:
        return preparing.until(last).run(graph)
    if last == "write_qdq":
        return write_qdq(CONVERSION.run(copy.deepcopy(prepared)))
    return CONVERSION.until(last).run(copy.deepcopy(prepared))


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.value)
def test_a_broken_graph_is_refused_by_name(stage: Stage, prepared):
    last, damage, message = BROKEN[stage]
    graph = graph_at(stage, last, prepared)
    assert stage_of(graph) is stage
    check_stage(graph, stage, pass_name="nothing")

    @graph_pass(before=stage, after=stage)
    def broken_pass(graph_module: GraphModule) -> int:
        damage(graph_module)
        return 1

    with pytest.raises(ptq.PTQError, match=f"pass broken_pass: {message}"):
        broken_pass(graph)


@pytest.mark.parametrize("stage", [Stage.OBSERVED, Stage.SIMULATED, Stage.LOWERED, Stage.CONVERTED, Stage.QDQ])
def test_a_product_of_the_plan_that_is_gone_is_missed(stage, prepared):
    graph = graph_at(stage, BROKEN[stage][0], prepared)
    lost_product(graph)
    with pytest.raises(ptq.PTQError, match=r"pass spy: product head: .*got no node"):
        check_stage(graph, stage, pass_name="spy")


@pytest.mark.parametrize("last", [step.name for step in CONVERSION.steps[:-1]])
def test_a_half_converted_graph_is_not_exported(last, prepared, tmp_path):
    half = CONVERSION.until(last).run(copy.deepcopy(prepared))
    with pytest.raises(ptq.PTQError, match=f"export_onnx: .* got stage {stage_of(half).value!r}; call convert_fx"):
        ptq.export_onnx(half, tmp_path / "half.onnx", X[:1])
    assert not list(tmp_path.iterdir())


def test_converted_lists_what_stays_in_float():
    def forward(m, x):
        return m.head(m.patches(F.gelu(m.stem(x))).flatten(2).mean(-1))

    model = model_of(forward, stem=nn.Conv2d(3, 4, 3, padding=1), patches=nn.Conv2d(4, 8, 4, 4), head=nn.Linear(8, 5))
    converted = ptq.convert_fx(calibrated(model, X))
    assert [op.name for op in float_products(converted)] == ["stem"]
    assert "windows overlap" in float_products(converted)[0].reason
