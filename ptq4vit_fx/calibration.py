"""A calibration: the parameters of every site, how they were found, and a file format for them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4vit_fx.errors import failure
from ptq4vit_fx.files import atomic_path
from ptq4vit_fx.plan import QuantPlan, Site
from ptq4vit_fx.quantizers import QParams, TwinParams, TwinUniform, UniformParams

FORMAT = "ptq4vit_fx calibration 1"


@dataclass(frozen=True)
class Calibration:
    """Parameters per site, the plan that they belong to, distances per product, and where they come from.

    distances: op name -> (at the initial scales, at the chosen scales), in the search's metric.
    provenance: JSON-ready facts: images, seed, fingerprint of the images, seconds, versions.
    """

    plan: QuantPlan
    params: dict[Site, QParams]
    distances: dict[str, tuple[float, float]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration to one safetensors file, its plan and provenance as JSON in the header.

        Written under a temporary name and moved. Raises PTQError if the folder is not writable.
        """
        tensors, axes = {}, {}
        for key, params in self.params.items():
            if isinstance(params, UniformParams):
                tensors[f"{key}/scale"] = params.scale.cpu()
                axes[key] = params.axis
            else:
                tensors[f"{key}/fine_scale"] = params.fine_scale.cpu()
                tensors[f"{key}/coarse_scale"] = params.coarse_scale.cpu()
        record = {"distances": self.distances, "provenance": self.provenance, "axes": axes}
        metadata = {"format": FORMAT, "plan": self.plan.to_json(), "record": json.dumps(record)}
        with atomic_path(path, "save calibration") as temporary:
            save_file(tensors, temporary, metadata)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `save` wrote. Raises PTQError if it is missing or something else."""
        try:
            with safe_open(os.fspath(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise failure(
                "Calibration.load",
                str(path),
                expected="a safetensors file written by Calibration.save",
                got=str(error),
                do="check the path",
            ) from error
        if metadata.get("format") != FORMAT:
            raise failure(
                "Calibration.load",
                str(path),
                expected=FORMAT,
                got=repr(metadata.get("format")),
                do="calibrate again with this version",
            )
        record = json.loads(metadata["record"])
        plan = QuantPlan.from_json(metadata["plan"])
        return Calibration(
            plan=plan,
            params={key: _params(tensors, key, record["axes"]) for key in plan.quantizers},
            distances={key: (value[0], value[1]) for key, value in record["distances"].items()},
            provenance=record["provenance"],
        )

    def fingerprint(self) -> str:
        """Return a short hash of every parameter: equal calibrations have equal fingerprints."""
        digest = hashlib.sha256()
        for key in sorted(self.params):
            params = self.params[key]
            tensors = [params.scale] if isinstance(params, UniformParams) else [params.fine_scale, params.coarse_scale]
            digest.update(key.encode())
            for tensor in tensors:
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def report(self) -> str:
        """Return a text table per site: scales, twin threshold, the product's distance before and after."""
        lines = [f"{'site':44}{'scale':>24}  {'threshold':>10}  {'distance before':>15}  {'after':>10}"]
        for key, params in self.params.items():
            op_name = key.rsplit(":", 1)[0]
            before, after = self.distances.get(op_name, (float("nan"), float("nan")))
            quantizer = self.plan.quantizers[key]
            threshold = ""
            if isinstance(quantizer, TwinUniform) and isinstance(params, TwinParams):
                threshold = f"{float(quantizer.threshold(params)):.4g}"
            lines.append(f"{key:44}{describe_params(params):>24}  {threshold:>10}  {before:15.4g}  {after:10.4g}")
        return "\n".join(lines)


def describe_params(params: QParams) -> str:
    """Return the scale, the range of the scales, or fine and coarse scale, in few characters."""
    if isinstance(params, TwinParams):
        return f"{float(params.fine_scale):.4g} | {float(params.coarse_scale):.4g}"
    if params.scale.ndim == 0:
        return f"{float(params.scale):.4g}"
    return f"{float(params.scale.min()):.4g} .. {float(params.scale.max()):.4g}"


def _params(tensors: dict[str, Tensor], key: Site, axes: dict[str, int | None]) -> QParams:
    if key in axes:
        return UniformParams(tensors[f"{key}/scale"], axes[key])
    return TwinParams(tensors[f"{key}/fine_scale"], tensors[f"{key}/coarse_scale"])


def fingerprint_images(batches: list[Tensor]) -> str:
    """Return a short hash of the calibration images."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.detach().cpu().contiguous().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
