"""Target `tensorrt`: int8 with zero point 0 everywhere, or a refusal that names what stands in the way."""

from __future__ import annotations

import onnx_ir as ir

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.containers import INT8, without_zero_points
from ptq4vit_fx.export.contract import Target, rewrite
from ptq4vit_fx.export.gemm_biases import keep_biases_out_of_gemm
from ptq4vit_fx.export.targets.generic import check_generic
from ptq4vit_fx.export.targets.lint_tensorrt import lint_tensorrt
from ptq4vit_fx.plan import QuantPlan


@rewrite(nothing="every activation has int8 codes with zero point 0, or none that fit")
def to_symmetric_int8(model: ir.Model, plan: QuantPlan) -> int:
    """Make activations int8 with zero point 0, in place, where that loses nothing; the linter names the rest.

    A signed grid of 8 bits moves from uint8 with zero point 128. The two branches of a GELU twin fit as well: a Clip
    keeps the positives out of one, and int8 holds 0 .. 127 of the other.
    """
    return without_zero_points(model, plan, (INT8,))[0]


def check_tensorrt(model: ir.Model) -> None:
    """Raise PTQError with the first violation and their number unless the linter passes."""
    check_generic(model)
    violations = lint_tensorrt(model)
    if violations:
        first = violations[0]
        raise failure(
            "export_onnx",
            f"node {first.node}",
            expected=f"what TensorRT holds ({first.rule})",
            got=f"{first.got}, the first of {len(violations)} violations (all: lint_tensorrt)",
            do=first.do,
        )


TARGET = Target(
    "tensorrt", (to_symmetric_int8, keep_biases_out_of_gemm), check_tensorrt, activation_bits=(8,), twins=False
)
