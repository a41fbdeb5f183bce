"""Deployment targets: what each runtime wants a QDQ file to look like, checked before the file is written.

The rules, and where each comes from, are in `target_<name>.py`; docs/targets.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from ptq4vit_fx.export.targets.generic import check_generic, rewrite_generic
from ptq4vit_fx.export.targets.onnxruntime import (
    check_arm,
    check_avx2,
    check_x86,
    rewrite_arm,
    rewrite_avx2,
    rewrite_x86,
)
from ptq4vit_fx.export.targets.openvino import check_openvino, rewrite_openvino
from ptq4vit_fx.export.targets.tensorrt import check_tensorrt, rewrite_tensorrt
from ptq4vit_fx.plan import QuantPlan


@dataclass(frozen=True)
class Target:
    """A runtime: `rewrite` returns the file that it wants, `check` raises PTQError that names the node."""

    name: str
    rewrite: Callable[[onnx.ModelProto, QuantPlan], onnx.ModelProto]
    check: Callable[[onnx.ModelProto], None]


TARGETS = {
    target.name: target
    for target in (
        Target("onnxruntime", rewrite_x86, check_x86),
        Target("onnxruntime-avx2", rewrite_avx2, check_avx2),
        Target("onnxruntime-arm", rewrite_arm, check_arm),
        Target("openvino", rewrite_openvino, check_openvino),
        Target("tensorrt", rewrite_tensorrt, check_tensorrt),
        Target("generic", rewrite_generic, check_generic),
    )
}
