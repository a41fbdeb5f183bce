"""Read a quantized ONNX file back: every site's quantizer and scales, and what the runtime will do with it."""

from __future__ import annotations

import os

import numpy as np
from onnx import numpy_helper

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.onnx_export import CALIBRATION_KEY, PLAN_KEY, TARGET_KEY, VERSION_KEY
from ptq4vit_fx.export.runtime import load_file, runtime_graph
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import TwinUniform, describe_quantizer


def describe_file(path: str | os.PathLike[str]) -> str:
    """Return the text of `ptq4vit inspect`. Raises PTQError if the file does not come from this package."""
    model = load_file(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if PLAN_KEY not in properties:
        do = "pass a file that export_onnx wrote"
        raise failure(
            "inspect", str(path), expected="a file with a quantization plan", got="none in its metadata", do=do
        )
    plan = QuantPlan.from_json(properties[PLAN_KEY])
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("scale")}
    lines = [
        f"ptq4vit_fx {properties[VERSION_KEY]}, target {properties[TARGET_KEY]}, calibration "
        f"{properties[CALIBRATION_KEY]}",
        f"{'site':40}{'quantizer':24}{'scale':>26}  threshold",
    ]
    for site, quantizer in plan.quantizers.items():
        threshold = ""
        if isinstance(quantizer, TwinUniform):
            fine = float(tensors[f"{site}_fine.scale"])
            scale = f"{fine:.4g} | {float(tensors[f'{site}_coarse.scale']):.4g}"
            threshold = f"{fine * quantizer.levels if quantizer.form == 'softmax' else 0:.4g}"
        else:
            name = f"{site}.scale"
            per_head = f"{site.replace(':', '.')}_head.scale"
            values = np.atleast_1d(tensors[per_head if per_head in tensors else name])
            low, high = float(values.min()), float(values.max())
            scale = f"{low:.4g}" if values.size == 1 else f"{low:.4g} .. {high:.4g}"
        lines.append(f"{site:40}{describe_quantizer(quantizer):24}{scale:>26}  {threshold}")
    lines += [f"{op.name:40}float: {op.reason}" for op in plan.float_ops]
    graph = runtime_graph(path)
    lines.append(f"ONNX Runtime: {len(graph.integer_products)} integer products, {len(graph.float_products)} in float")
    lines += [f"  float: {name}: {reason}" for name, reason in graph.float_products.items()]
    return "\n".join(lines)
