"""Read every scale of a file back, with onnx, onnx_ir and numpy."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.metadata import PLAN_KEY, calibrated_scales
from ptq4vit_fx.export.model_files import load_file, unreadable
from ptq4vit_fx.export.nodes import array
from ptq4vit_fx.names import RANGES, Site, branch, tensor
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import Quantizer, TwinUniform


@dataclass(frozen=True)
class SiteScales:
    """The quantizer of a site and its scales in the file.

    scale: float32, shape () per tensor, (heads,) per head, (channels,) per channel or group of a weight; of a twin the
    fine scale, shape (). coarse_scale: of a twin, shape (), else None.
    """

    quantizer: Quantizer
    scale: NDArray[np.float32]
    coarse_scale: NDArray[np.float32] | None = None


def read_scales(path: str | os.PathLike[str]) -> dict[Site, SiteScales]:
    """Return the scales of every site of a file that `export_onnx` wrote, bit for bit as they were calibrated.

    Operands that stay float have none.

    They are initializers with the site's name: `<site>.scale`, `<site>_fine.scale` and `<site>_coarse.scale` of a twin.
    Where the file computes with others, because scales per head were divided out, or holds a weight in parts, they are
    in its metadata (docs/targets.md reads both without this package). Raises PTQError if the file has no plan, or
    lacks a scale that the plan promises.
    """
    model = load_file(path)
    with unreadable("read_scales", path, "a file that export_onnx wrote"):
        return _scales_of(model, str(path))


def _scales_of(model: ir.Model, path: str) -> dict[Site, SiteScales]:
    plan = model.metadata_props.get(PLAN_KEY)
    if plan is None:
        do = "pass a file that export_onnx wrote"
        raise failure("read_scales", path, expected="a quantization plan", got="none in its metadata", do=do)

    def read(scope: str) -> NDArray[np.float32]:
        name = tensor(scope, "scale")
        if name not in model.graph.initializers:
            do = "export the file again"
            raise failure("read_scales", path, expected=f"an initializer {name}", got="none", do=do)
        return array(model.graph.initializers[name])

    scales, elsewhere = {}, calibrated_scales(model.metadata_props, "read_scales", path)
    for site, quantizer in QuantPlan.from_json(plan, "read_scales", path).grids.items():
        if isinstance(quantizer, TwinUniform):
            scales[site] = SiteScales(quantizer, *(read(branch(site, part)) for part in RANGES))
        elif site in elsewhere:
            per_tensor = quantizer.granularity == "tensor"
            scales[site] = SiteScales(quantizer, elsewhere[site].reshape(()) if per_tensor else elsewhere[site])
        else:
            scales[site] = SiteScales(quantizer, read(site))
    return scales
