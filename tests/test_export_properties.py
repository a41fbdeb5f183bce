"""Random graphs of our quantizers in ONNX Runtime: codes and products, bit for bit, with its optimizations off and on.

What "bit for bit" can mean: ONNX Runtime without optimizations multiplies dequantized floats, whose partial sums round,
so that a later quantizer sees another last bit than the integer product gives. Every step is therefore held against its
definition on the input that the runtime itself gave it: each quantizer's codes, at both levels; each product, to the
last bit where it runs on integers and within the rounding of a float sum where it does not. With optimizations, as
files are deployed, whole graphs are compared too: every code of every site, and the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx import names
from ptq4vit_fx.export.integer_products import in_qdq_form, integer_products
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.nodes import array
from ptq4vit_fx.export.proof.layers import add_outputs
from ptq4vit_fx.export.proof.runtime import exact_here, open_model, quiet_options
from ptq4vit_fx.export.stored_sites import integers, stored_sites

SEARCH = ptq.SearchSettings(metric="mse", n=8, rounds=1, max_shift=4)
#: Blocks that PyTorch and ONNX Runtime compute to the same bit, and those with a function that they round differently.
EXACT = ("linear", "relu", "scores")
ROUNDED = ("gelu", "attention", "norm")


class Block(NamedTuple):
    kind: str
    bias: bool = True
    residual: bool = False


@dataclass(frozen=True)
class Case:
    """A random model and how it is quantized."""

    blocks: tuple[Block, ...]
    heads: int = 2
    head_dim: int = 4
    side: int = 2
    w_bits: int = 8
    a_bits: int = 8
    weights: str = "channel"
    matmul: str = "head"
    twins: str | None = "exact"
    magnitude: float = 1.0
    seed: int = 0


class Attention(nn.Module):
    """Softmax attention, or without softmax and values (kind "scores") the products q @ k alone, mixed by a linear."""

    def __init__(self, kind: str, tokens: int, heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.softmax, self.heads, self.head_dim = kind == "attention", heads, head_dim
        dim = heads * head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim if self.softmax else heads * tokens, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v if self.softmax else scores).transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """Blocks over the pixels of an image, (batch, dim, side, side) -> (batch, side * side * dim)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        dim = case.heads * case.head_dim
        self.residuals = [block.residual for block in case.blocks]
        self.blocks = nn.ModuleList(_block(block, dim, case) for block in case.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        for block, residual in zip(self.blocks, self.residuals, strict=True):
            x = x + block(x) if residual else block(x)
        return x.flatten(1)


def _block(block: Block, dim: int, case: Case) -> nn.Module:
    if block.kind == "linear":
        return nn.Linear(dim, dim, bias=block.bias)
    if block.kind == "norm":
        return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim, bias=block.bias))
    if block.kind in ("relu", "gelu"):
        between = nn.ReLU() if block.kind == "relu" else nn.GELU()
        return nn.Sequential(nn.Linear(dim, 2 * dim, bias=block.bias), between, nn.Linear(2 * dim, dim))
    return Attention(block.kind, case.side**2, case.heads, case.head_dim, block.bias)


def quantized(case, folder):
    """Return the float model, the converted one, its file read back, and images that calibration has not seen."""
    torch.manual_seed(case.seed)
    images = case.magnitude * torch.randn(8, case.heads * case.head_dim, case.side, case.side)
    twins: dict[str, Any] = {
        form: ptq.Uniform(case.a_bits, signed=False)
        if case.twins == "unsigned"
        else case.twins and ptq.TwinUniform(case.a_bits, form, wide=case.twins == "wide")
        for form in ("softmax", "gelu")
    }
    qconfig = ptq.QConfig(
        activation=ptq.Uniform(case.a_bits),
        weight=ptq.Uniform(case.w_bits, granularity=case.weights),
        matmul=ptq.Uniform(case.a_bits, granularity=case.matmul),
        search=SEARCH,
        **twins,
    )
    network = Tokens(case).eval()
    prepared = ptq.prepare_fx(network, ptq.QConfigMapping().set_global(qconfig), images[:1])
    ptq.calibrate(prepared, images[:3], progress=False)
    converted = ptq.convert_fx(prepared)
    ptq.export_onnx(converted, folder / "model.onnx", images[:1])
    return network, converted, load_file(folder / "model.onnx"), 1.5 * images[3:]


def run_with_values(model, images, *, optimize):
    """Run the file; return the value of every tensor that a quantizer reads or writes and of every product."""
    results = [node.outputs[0].name for node in model.graph if node.op_type in ("QuantizeLinear", "MatMul")]
    wanted = dict.fromkeys(results + [node.inputs[0].name for node in model.graph if node.op_type == "QuantizeLinear"])
    wanted |= dict.fromkeys(result for result, _, _ in with_what_is_behind(model).values())
    wanted.pop("image", None)
    copied = exact_here(model)
    own = {output.name for output in model.graph.outputs}
    add_outputs(copied, tuple(name for name in wanted if name not in own))
    options = quiet_options(threads=1)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_model(copied, options=options)
    found = [output.name for output in session.get_outputs()]
    values = dict(zip(found, session.run(None, {"image": images.numpy()}), strict=True))
    return values | {"image": images.numpy()}


def with_what_is_behind(model):
    """Return name of a MatMulInteger's result alone -> (name of what the runtime fuses, scale per head, bias)."""
    products = list(integer_products(model))
    results = {product.scaled.outputs[0] for product in products if product.heads is None}
    adds = [node for node in model.graph if node.op_type == "Add" and node.inputs[0] in results]
    found = {add.inputs[0].name: (add.outputs[0].name, np.float32(1), array(add.inputs[1])) for add in adds}
    for product in products:
        if product.heads is not None:
            scale = array(product.heads.inputs[1])
            found[product.result] = (product.scaled.outputs[0].name, scale, np.float32(0))
    return found


def check_quantizers(converted, model, values):
    """Every QuantizeLinear gives the codes of the plan's quantizer at the float values that it was given."""
    stored = stored_sites(model)
    checked = 0
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            name = node.name.removesuffix("/QuantizeLinear")
            site, _, branch = name.rpartition("_") if name not in converted.plan.quantizers else (name, "", "")
            quantizer = converted.plan.quantizers[site]
            codes = integers(values[node.outputs[0].name], stored[name])
            per_head = names.is_head_scale(node.inputs[1].name)  # divided by the quantizer, not in front of it
            scale = stored[name].calibrated.reshape(-1, 1, 1) if per_head else stored[name].scale
            scaled = values[node.inputs[0].name] / scale
            if branch:
                low, high = _branch_limits(converted, site, branch)
            else:
                below = (
                    2 ** (quantizer.bits - 1) if quantizer.signed else np.rint(quantizer.minimum / stored[name].scale)
                )
                low, high = -below, 2**quantizer.bits - 1 - below
            np.testing.assert_array_equal(codes, np.rint(scaled).clip(low, high), err_msg=name)
            checked += 1
    return checked


def _branch_limits(converted, site, branch):
    """The codes of a twin's branch, from its formulas: threshold reached from below by the fine branch."""
    twin, params = converted.plan.quantizers[site], converted.calibration.params[site]
    if twin.wide:
        top = 2**twin.bits - 1
        return (-top, 0) if twin.form == "gelu" and branch == "fine" else (0, top)
    if twin.form == "gelu":
        return (-twin.levels, 0) if branch == "fine" else (0, twin.levels - 1)
    top = twin.levels if params.shift <= twin.bits - 1 else twin.levels - 1
    return 0, top


def check_products(model, values, *, integer):
    """Every product of two quantized operands, at the codes that it was given.

    integer: to the last bit, the integer sum times the product of the scales; a MatMulInteger always. Else within the
    rounding of a float sum of `inner` terms, each itself a rounded product of two rounded values: (inner + 4) half
    steps of the terms' size.
    """
    stored = {site.tensor.partition("_part")[0]: site for site in stored_sites(model).values()}
    fused = with_what_is_behind(model)
    checked = 0
    for node in in_qdq_form(model).graph:
        if node.op_type == "MatMul":
            sites = [stored[value.producer().inputs[0].name.partition("_part")[0]] for value in node.inputs]
            lhs, rhs = (integers(values[s.tensor] if s.codes is None else s.codes, s).astype(np.int64) for s in sites)
            output = node.outputs[0].name
            result, per_head, bias = fused.get(output, (output, np.float32(1), np.float32(0)))
            actual = values[result]
            sites[1], rhs = part_of(node, sites[1], rhs)
            if integer or output in fused:
                scale = sites[0].scale * (sites[1].scale * per_head)
                expected = (lhs @ rhs).astype(np.float32) * scale + bias
                np.testing.assert_array_equal(actual, expected, err_msg=node.name)
            else:
                scale = sites[0].scale.astype(np.float64) * sites[1].scale
                bound = (lhs.shape[-1] + 4) * 2.0**-24 * (np.abs(lhs) @ np.abs(rhs)) * scale
                assert (np.abs(actual - (lhs @ rhs) * scale) <= bound).all(), node.name
            checked += 1
    return checked


def part_of(node, stored, codes):
    """Return a projection's weight as it is, or the columns of one of the three products that it became."""
    _, part, number = node.name.partition("_part")
    if not part:
        return stored, codes
    scale = np.split(stored.scale, 3)[int(number)] if stored.scale.ndim else stored.scale
    return replace(stored, scale=scale), np.split(codes, 3, axis=-1)[int(number)]


def check_weights(network, converted, model):
    """Every stored weight decodes to the fake-quantized float weight."""
    for name, site in stored_sites(model).items():
        if site.codes is not None:
            weight = network.get_submodule(name.removesuffix(":rhs")).weight.detach()
            params = converted.calibration.params[name]
            expected = converted.plan.quantizers[name].fake_quantize(weight, params)
            scale = site.scale if site.calibrated is None else site.calibrated
            decoded = integers(site.codes, site).astype(np.float32) * scale
            np.testing.assert_array_equal(decoded, expected.t().numpy(), err_msg=name)
            if site.calibrated is not None:
                divided = site.scale * divisors(name, converted, model)
                np.testing.assert_allclose(divided, np.broadcast_to(scale, divided.shape), rtol=1e-6)


def divisors(name, converted, model):
    """What each column of a q/k/v projection is divided by: its head's scale over that of the quantizer behind."""
    path, stored, columns = name.removesuffix("qkv:rhs"), stored_sites(model), stored_sites(model)[name].scale.size
    operands: tuple[str, ...] = ("matmul_qk:lhs", "matmul_qk:rhs", "matmul_av:rhs")
    if f"{path}matmul:lhs" in stored:  # kind "scores": no values
        operands = ("matmul:lhs", "matmul:rhs")
    expected = np.ones((3, columns // 3), np.float32)
    for row, operand in zip(expected, operands, strict=False):
        scale = converted.calibration.params[f"{path}{operand}"].scale.numpy() / stored[f"{path}{operand}"].scale
        row[:] = np.repeat(scale, row.size // scale.size)
    return expected.reshape(-1)


blocks = st.builds(Block, st.sampled_from(EXACT + ROUNDED), st.booleans(), st.booleans())
cases = st.builds(
    Case,
    blocks=st.lists(blocks, min_size=1, max_size=3).map(tuple),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([3, 4, 16]),
    side=st.integers(1, 3),
    w_bits=st.integers(2, 8),
    a_bits=st.integers(2, 8),
    weights=st.sampled_from(["tensor", "channel", "group"]),
    matmul=st.sampled_from(["tensor", "head"]),
    twins=st.sampled_from([None, "unsigned", "exact", "wide"]),
    magnitude=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**16),
)


CASES = [
    Case((Block("norm"), Block("attention", residual=True), Block("gelu", residual=True))),
    Case((Block("attention", bias=False), Block("gelu")), w_bits=4, a_bits=4, weights="group"),
    Case((Block("attention"), Block("gelu")), twins="wide"),
    Case((Block("attention"), Block("gelu")), w_bits=4, a_bits=4, twins="wide"),
    Case((Block("attention"), Block("gelu")), twins="unsigned"),
    Case((Block("attention"), Block("gelu")), w_bits=4, a_bits=4, twins="unsigned"),
    Case((Block("relu"), Block("scores"), Block("linear")), w_bits=2, a_bits=3, matmul="tensor"),
]
RANDOM = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_runtime_computes_what_the_formulas_say(tmp_path, case):
    check(tmp_path, case)


@settings(RANDOM, max_examples=4)
@given(case=cases)
def test_of_a_few_random_models_too(tmp_path_factory, case):
    check(tmp_path_factory.mktemp("case"), case)


@pytest.mark.sweep
@settings(RANDOM, max_examples=40)
@given(case=cases)
def test_of_many_random_models_too(tmp_path_factory, case):
    check(tmp_path_factory.mktemp("case"), case)


def check(folder, case):
    """Quantize and export the model, and hold every step that the runtime takes against its formula."""
    network, converted, model, images = quantized(case, folder)
    check_weights(network, converted, model)
    for optimize in (False, True):
        values = run_with_values(model, images, optimize=optimize)
        quantizers = check_quantizers(converted, model, values)
        products = check_products(model, values, integer=optimize)
        assert quantizers >= 1
        assert products >= len(converted.plan.ops)
    report = ptq.verify_onnx(folder / "model.onnx", converted, [images[:1], images[1:]], layers=len(images))
    assert report.first_divergence is None, f"{case}\n{report}"
    assert report.same_functions.bit_equal == 1.0
    if all(block.kind in EXACT for block in case.blocks):
        assert report.simulation.bit_equal == 1.0
