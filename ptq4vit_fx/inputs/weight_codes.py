"""Codes of a weight that a calibration holds, beside the scales: what may stand there, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ptq4vit_fx.inputs.records import Place
from ptq4vit_fx.names import Site, site, site_and_role
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.quantizers import QParams, Uniform, UniformParams

#: The role of such codes among the tensors of a calibration file.
CODES = "codes"


def codes_of(tensors: Mapping[str, Tensor]) -> tuple[dict[Site, Tensor], dict[str, Tensor]]:
    """Return the codes among the tensors of a calibration file, by site, and the other tensors."""
    named = {name: site_and_role(name) for name in tensors}
    codes = {key: tensors[name] for name, (key, role) in named.items() if role == CODES}
    return codes, {name: x for name, x in tensors.items() if named[name][1] != CODES}


def check_codes(plan: QuantPlan, params: Mapping[Site, QParams], codes: Mapping[Site, Any], place: Place) -> None:
    """Raise PTQError unless all codes are of a weight of the plan: int8, and such as its quantizer gives.

    Whether they have the shape of the weight, only the model says (`calibrating/fit.py`).
    """
    weights = {site(op.name, "rhs"): op for op in plan.ops if op.rhs_is_weight}
    for key in sorted(codes):
        quantizer = plan.quantizers.get(key)
        if key not in weights or not isinstance(quantizer, Uniform):
            raise place.at(key).refusal("codes of a weight of the plan beside them", "of something else")
        if not isinstance(own := params.get(key), UniformParams):
            raise place.at(key).refusal("scales beside the codes", "none")
        _check_tensor(weights[key], own, codes[key], place.at(key))
        first = -int(quantizer.zero_point(own.scale).amax())
        last = first + quantizer.top
        low, high = (int(bound) for bound in torch.aminmax(codes[key]))
        if low < first or high > last:
            raise place.at(key).refusal(f"codes from {first} to {last}", f"{low} to {high}")


def _check_tensor(op: QuantOp, params: UniformParams, codes: Any, place: Place) -> None:
    if not isinstance(codes, Tensor) or codes.dtype is not torch.int8:
        raise place.refusal("codes of int8", str(getattr(codes, "dtype", type(codes).__name__)))
    dimensions, shape = 4 if op.kind == "conv2d" else 2, tuple(codes.shape)
    if len(shape) != dimensions or 0 in shape or codes.is_meta or codes.layout is not torch.strided:
        raise place.refusal(f"codes in {dimensions} dimensions", f"shape {shape}, {codes.layout}, {codes.device.type}")
    if params.axis is not None and codes.shape[params.axis] != len(params.scale):
        raise place.refusal(f"codes of {len(params.scale)} channels, as there are scales", f"shape {shape}")
