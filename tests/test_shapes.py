"""The shape of every node after every pass is what an interpreter computes there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graphs import QUICK, calibrated, model_of, two_blocks
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.fold_head_scales import fold_head_scales
from ptq4vit_fx.passes.graph.contract import attach, graph_pass, history
from ptq4vit_fx.passes.graph.marks import planned_product
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.shapes import MULTIPLIES, is_tensor, record_shapes, shape_of
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.passes.write_qdq import write_qdq
from ptq4vit_fx.pipeline import CONVERSION, preparation
from ptq4vit_fx.tools.families import find_family

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Comparison(Interpreter):
    """Runs a graph, and holds what is noted of every node against what it gives."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.compared = 0
        self.wrong: list[str] = []

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        noted = n.meta.get("tensor_meta")
        if isinstance(result, Tensor) and n.op != "output":
            self.compared += 1
            if (shape_of(n), getattr(noted, "dtype", None)) != (tuple(result.shape), result.dtype):
                self.wrong.append(f"{n.name}: {noted}, but it is {tuple(result.shape)}, {result.dtype}")
        elif isinstance(result, int) and noted != result:
            self.wrong.append(f"{n.name}: {noted}, but it is {result}")
        return result


def check(graph_module: GraphModule, image: Tensor, step: str) -> None:
    comparison = Comparison(graph_module)
    with torch.no_grad():
        comparison.run(image)
    assert comparison.compared > 10
    assert not comparison.wrong, f"after {step}"


FAMILIES = ("visformer", "xcit", "vit", "deit_distilled", "swinv2", "levit", "cait", "mobilevit", "mvitv2", "dinov3")


@pytest.mark.parametrize(
    "family", [*FAMILIES[:2], *(pytest.param(family, marks=pytest.mark.sweep) for family in FAMILIES[2:])]
)
def test_every_pass_over_a_family(family):
    entry = find_family(family)
    model, image = entry.create(), torch.randn(1, 3, entry.image, entry.image)
    mapping = ptq.recipes.ptq4vit().with_search(**QUICK)
    graph = trace(model, (image,))
    for step in preparation(mapping).steps:
        step.run(graph)
        check(graph, image, step.name)
    attach(graph, calibration=None)
    ptq.calibrate(graph, image, progress=False)
    for step in CONVERSION.steps:
        step.run(graph)
        check(graph, image, step.name)
    write_qdq(graph)
    check(graph, image, "write_qdq")


class ConvolutionalAttention(nn.Module):
    """q, k and v by convolutions of one pixel: their tokens have three dimensions, their maps four."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 12, 1) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2).transpose(1, 2).unflatten(-1, (3, 4)) for layer in (self.q, self.k, self.v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


def test_scales_per_head_go_into_convolutions_of_one_pixel():
    torch.manual_seed(0)
    model, images = ConvolutionalAttention().eval(), torch.randn(4, 8, 4, 4)
    converted = ptq.quantize(model, images, progress=False)
    assert next(r.count for r in history(converted) if r.name == "fold_head_scales") == 3
    assert (converted(images) - model(images)).norm() / model(images).norm() < 0.01


def test_scales_per_head_go_into_every_projection_of_visformer():
    entry = find_family("visformer")
    images = torch.randn(2, 3, entry.image, entry.image, generator=torch.Generator().manual_seed(0))
    lowered = CONVERSION.until("lower_activations").run(calibrated(entry.create(), images))
    before = lowered(images)
    fold_head_scales(lowered)
    assert history(lowered)[-1].count == 6
    torch.testing.assert_close(lowered(images), before, rtol=1e-4, atol=1e-5)


def test_a_pass_may_leave_shapes_alone_and_a_bad_call_is_found():
    @graph_pass(before=Stage.TRACED, after=Stage.TRACED)
    def widen(graph_module: GraphModule) -> int:
        node = next(node for node in graph_module.graph.nodes if node.target is torch.tanh)
        replace(node, Writer(node)(torch.cat, [node.args[0], node.args[0]], 1))
        return 1

    graph = trace(model_of(lambda m, x: torch.tanh(x).flatten(1).sum(1)), (X[:1],))
    widen(graph)
    check_shapes = {node.name: shape_of(node) for node in graph.graph.nodes if is_tensor(node)}
    assert check_shapes["cat"] == (1, 6, 8, 8)
    assert check_shapes["flatten"] == (1, 384)

    @graph_pass(before=Stage.TRACED, after=Stage.TRACED)
    def multiply(graph_module: GraphModule) -> int:
        node = next(node for node in graph_module.graph.nodes if node.target == "flatten")
        replace(node, Writer(node)(torch.matmul, node.args[0], torch.float32))
        return 1

    with pytest.raises(ptq.PTQError, match=r"pass multiply: node matmul: expected operands that torch.matmul takes"):
        multiply(graph)


def test_multiplications_are_those_of_the_graph_as_it_is():
    prepared = calibrated(two_blocks(), X)

    def known(graph_module):
        return {planned_product(n): n.meta[MULTIPLIES] for n in graph_module.graph.nodes if n.meta.get(MULTIPLIES)}

    counts = known(prepared)
    assert counts.keys() == {op.name for op in prepared.plan.ops}
    assert counts["patches"] == 4 * 48 * 8
    assert counts["blocks.0.qkv"] == 5 * 8 * 24
    assert counts["blocks.0.matmul_qk"] == 2 * 5 * 4 * 5
    again = copy.deepcopy(prepared)
    record_shapes(again, (X[:1],))
    assert known(again) == counts
