"""Deployment targets: what each runtime wants a QDQ file to look like, checked before the file is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.runtime import with_unsigned_weights

STANDARD_DOMAINS = {"", "ai.onnx"}


@dataclass(frozen=True)
class Target:
    """A runtime: `rewrite` returns the file that it wants, `check` raises PTQError that names the node."""

    name: str
    rewrite: Callable[[onnx.ModelProto], onnx.ModelProto]
    check: Callable[[onnx.ModelProto], None]


def _check_onnxruntime(model: onnx.ModelProto) -> None:
    """Standard operators only; uint8 activations and int8 weights, every zero point written out.

    ONNX Runtime's CPU provider fuses DequantizeLinear, DequantizeLinear -> MatMul into MatMulIntegerToFloat for
    these types (onnxruntime/core/optimizer/qdq_transformer/selectors_actions).
    """
    for node in model.graph.node:
        if node.domain not in STANDARD_DOMAINS:
            raise failure(
                "export_onnx",
                f"node {node.name}",
                expected="a standard operator",
                got=f"{node.domain}::{node.op_type}",
                do="report this as a bug",
            )
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) != 3:
            raise failure(
                "export_onnx",
                f"node {node.name}",
                expected="a zero point",
                got="none",
                do="report this as a bug",
            )


def _as_it_is(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


TARGETS = {
    target.name: target
    for target in (
        # x86 with VNNI or AMX (2019 and newer servers): u8 activations, s8 weights.
        Target("onnxruntime", _as_it_is, _check_onnxruntime),
        # x86 without VNNI: u8 weights too, because the u8 x s8 kernels of AVX2 saturate (see runtime.py).
        Target("onnxruntime-avx2", with_unsigned_weights, _check_onnxruntime),
    )
}
