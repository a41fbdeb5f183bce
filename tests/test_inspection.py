"""`ptq4vit inspect`: what is stored, what ONNX Runtime makes of it, and on which CPU."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.export.proof import instructions
from ptq4vit_fx.export.proof.inspection import inspect_file
from ptq4vit_fx.export.proof.instructions import Instructions, cpu_instructions, cpuinfo_flags, instruction_sets
from ptq4vit_fx.export.proof.runtime import products_saturate
from ptq4vit_fx.export.proof.runtime_graph import runtime_graph
from ptq4vit_fx.tools.cli import app


class Mixed(nn.Module):
    """Convolutions that overlap, two projections with one quantizer, an attention, a head that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x)).flatten(2).transpose(1, 2)
        attention = torch.matmul(self.query(x), self.key(x).transpose(1, 2)).softmax(-1)
        return self.head(self.out(torch.matmul(attention, x)).mean(1))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    mapping = ptq.recipes.ptq4vit().with_search(n=2, rounds=1)
    prepared = ptq.prepare_fx(Mixed().eval(), mapping, images[:1], skip=["head"])
    ptq.calibrate(prepared, images, progress=False)
    folder = tmp_path_factory.mktemp("inspect")
    converted = ptq.convert_fx(prepared)
    for target in ("onnxruntime", "onnxruntime-avx2"):
        ptq.export_onnx(converted, folder / f"{target}.onnx", images[:1], target=target)
    return folder


def test_each_product_is_integer_or_float_with_the_reason(mixed):
    report = inspect_file(mixed / "onnxruntime.onnx")
    products = {product.name.partition("_token")[0]: product for product in report.graph.products}
    linear = products["query/MatMulInteger"]
    assert (linear.integer, linear.operator, linear.types) == (True, "MatMulIntegerToFloat", "uint8 x int8")
    assert products["matmul_qk/MatMul"].types == "uint8 x uint8"
    assert "so is the result" in products["stem/Conv"].reason
    assert not products["depthwise/Conv"].integer
    assert "no integer kernel for Conv of these types" in products["depthwise/Conv"].reason
    assert products["depthwise/Conv"].types == "uint8 x int8"
    (head,) = [product for name, product in products.items() if name.startswith("head/")]
    assert not head.integer
    assert head.reason.startswith("left float: ")
    assert len(products) == 9  # matmul_av has two branches
    text = str(report)
    assert all(f"{product.name} " in text and product.reason in text for product in products.values())
    assert "7 integer products, 2 in float" in text


def test_what_is_left_dequantized_is_named(mixed):
    report = inspect_file(mixed / "onnxruntime.onnx")
    found = {leftover.name: leftover for leftover in report.graph.leftovers}
    assert set(found) == {"depthwise:lhs/DequantizeLinear", "depthwise:rhs/DequantizeLinear"}
    assert found["depthwise:lhs/DequantizeLinear"].source.startswith("stem/Conv")
    assert found["depthwise:rhs/DequantizeLinear"].source == "a constant"
    assert all(leftover.reason == "feeds depthwise/Conv, a product that runs in float" for leftover in found.values())
    assert "depthwise:lhs/DequantizeLinear (codes from stem/Conv" in str(report)


def pairs(*consumers):
    """Quantize x, dequantize it, hand it to the consumers."""
    constants = [
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.float32(0.25), "other"),
        numpy_helper.from_array(np.uint8(3), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "first/QuantizeLinear"),
        helper.make_node("Transpose", ["q"], ["t"], "turn"),
        helper.make_node("DequantizeLinear", ["t", "scale", "zero"], ["d"], "first/DequantizeLinear"),
        *consumers,
    ]
    graph = helper.make_graph(
        nodes,
        "pairs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


def test_pairs_without_an_integer_operator_between_are_named():
    (alone,) = runtime_graph(pairs(helper.make_node("Softmax", ["d"], ["y"], "soft"))).leftovers
    assert alone.name.endswith("DequantizeLinear")
    assert alone.source.endswith("QuantizeLinear")
    assert alone.reason == "feeds soft, which computes in float"
    again = runtime_graph(
        pairs(
            helper.make_node("QuantizeLinear", ["d", "other", "zero"], ["q2"], "second/QuantizeLinear"),
            helper.make_node("DequantizeLinear", ["q2", "other", "zero"], ["y"], "second/DequantizeLinear"),
        )
    ).leftovers
    assert len(again) == 2
    assert "is quantized again at once by second/QuantizeLinear" in again[0].reason
    assert "is an output of the model" in again[1].reason


def test_sites_and_merged_quantizers(mixed):
    report = inspect_file(mixed / "onnxruntime.onnx")
    records = {record.site: record for record in report.sites}
    assert records["query:lhs"].merged_with is None
    assert records["key:lhs"].merged_with == "query:lhs"
    assert records["key:lhs"].scales == records["query:lhs"].scales
    twin = records["matmul_av:lhs"]
    assert twin.quantizer == "twin8/softmax"
    assert twin.threshold == pytest.approx(twin.scales[0] * 128)
    assert report.inputs == {"image": ("any", 3, 8, 8)}


def test_a_renamed_graph_is_refused(tmp_path, mixed):
    model = onnx.load(mixed / "onnxruntime.onnx")
    for number, node in enumerate(model.graph.node):
        node.name = str(number)
    onnx.save(model, tmp_path / "renamed.onnx")
    with pytest.raises(ptq.PTQError, match="site stem:lhs: expected a quantizer or a weight of that name"):
        inspect_file(tmp_path / "renamed.onnx")


def test_saturation_depends_on_the_cpu_and_on_the_weights(mixed, monkeypatch):
    monkeypatch.setattr(instructions, "products_saturate", lambda: True)
    signed, unsigned = (inspect_file(mixed / f"{name}.onnx") for name in ("onnxruntime", "onnxruntime-avx2"))
    (trap,) = signed.traps
    assert (trap.name, len(trap.places)) == ("saturation", 5)
    assert 'target="onnxruntime-avx2" (uint8 weights), or quantize with w_bits=7' in str(signed)
    assert not unsigned.traps
    assert "its results are exact here" in str(unsigned)
    monkeypatch.setattr(instructions, "products_saturate", lambda: False)
    assert "w_bits=7" not in str(inspect_file(mixed / "onnxruntime.onnx"))


def test_instruction_sets_of_flags():
    assert instruction_sets(["avx", "avx2", "avx512bw", "avx512_vnni", "amx_int8"]) == (
        "AMX",
        "AVX512-VNNI",
        "AVX512",
        "AVX2",
    )
    assert instruction_sets(["avx2", "avx_vnni"]) == ("AVX-VNNI", "AVX2")
    assert instruction_sets(["fp", "asimd", "asimddp", "i8mm"]) == ("I8MM", "dotprod")
    assert instruction_sets({"neon", "dot"}) == ("dotprod",)
    assert instruction_sets(["avx5122"]) == ()
    assert cpuinfo_flags("processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags : none\n") == ["fpu", "avx2"]
    assert cpuinfo_flags("Features\t: fp asimddp\n") == ["fp", "asimddp"]
    assert cpuinfo_flags("processor : 0\n") is None


def test_this_cpu_in_words(tmp_path, monkeypatch):
    with_torch = cpu_instructions()
    assert with_torch.saturates == products_saturate()
    monkeypatch.setattr(torch.cpu, "get_capabilities", None, raising=False)
    if instructions.CPUINFO.is_file():
        assert cpu_instructions().found == with_torch.found
    monkeypatch.setattr(instructions, "CPUINFO", tmp_path / "none")
    assert cpu_instructions().found is None
    assert "instruction sets unknown (this system does not tell)" in str(cpu_instructions())
    assert "no instruction for dot products" in str(Instructions("x86_64", ("AVX2",), True))
    assert "dot products" not in str(Instructions("x86_64", ("AVX512-VNNI", "AVX2"), False))
    assert "none of AMX" in str(Instructions("riscv64", (), False))


def test_json_and_text_from_the_command_line(mixed):
    path = str(mixed / "onnxruntime.onnx")
    printed = CliRunner().invoke(app, ["inspect", path, "--json"])
    assert printed.exit_code == 0, printed.output
    record = json.loads(printed.output)
    assert {product["name"] for product in record["graph"]["products"]} >= {"query/MatMulInteger", "depthwise/Conv"}
    assert record["cpu"]["saturates"] == products_saturate()
    shown = CliRunner().invoke(app, ["inspect", path])
    assert "depthwise/Conv" in shown.output
    assert "measured: u8 x s8 products" in shown.output
