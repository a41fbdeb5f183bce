"""A calibration: the parameters of every site, how they were found, and a file format for them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4vit_fx.errors import failure
from ptq4vit_fx.files import atomic_path
from ptq4vit_fx.names import OPERANDS, Site, product_of, site, site_and_role, stored
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import QParams
from ptq4vit_fx.remarks import Remark, remarks

FORMAT = "ptq4vit_fx calibration 1"


@dataclass(frozen=True)
class SearchResult:
    """Parameters of both operands, and what they do on all rows.

    distance_before is at the initial scales; a metric with gradients gives sum((dL/dout)^2 (out^ - out)^2) over the
    calibration images, which compares products with each other. snr: signal-to-noise ratio in dB, 10 log10(sum x^2 /
    sum (x^ - x)^2), of "lhs", "rhs" and "out"; infinite where quantization changes nothing. share: distance_after over
    the distance of an output of zeros. without_gradient: whether the metric wanted one and no gradient of the loss
    reached the product, so that plain squared error decided.
    """

    lhs: QParams
    rhs: QParams
    distance_before: float
    distance_after: float
    snr: dict[str, float]
    share: float = 0.0
    without_gradient: bool = False


@dataclass(frozen=True)
class Calibration:
    """Parameters per site, the plan that they belong to, what they do, and where they come from.

    distances: op name -> (at the initial scales, at the chosen scales), in the search's metric. snr: site, or op name
    for its output -> signal-to-noise ratio in dB. shares: op name -> distance over that of an output of zeros.
    without_gradient: the products that squared error decided although the metric wanted gradients. seconds: op name ->
    seconds of its search. provenance: JSON-ready facts: images, seed, fingerprints of images and weights, seconds,
    versions. A checkpoint is a calibration that lacks some sites.
    """

    plan: QuantPlan
    params: dict[Site, QParams]
    distances: dict[str, tuple[float, float]] = field(default_factory=dict)
    snr: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    without_gradient: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def with_result(self, op_name: str, result: SearchResult, seconds: float) -> Calibration:
        """Return this calibration with the result of one more product."""
        sites = {operand: site(op_name, operand) for operand in OPERANDS}
        return replace(
            self,
            params=self.params | {sites["lhs"]: result.lhs, sites["rhs"]: result.rhs},
            distances=self.distances | {op_name: (result.distance_before, result.distance_after)},
            snr=self.snr | {sites[operand]: result.snr[operand] for operand in OPERANDS} | {op_name: result.snr["out"]},
            shares=self.shares | {op_name: result.share},
            without_gradient=self.without_gradient + ((op_name,) if result.without_gradient else ()),
            seconds=self.seconds | {op_name: round(seconds, 4)},
        )

    def with_provenance(self, facts: dict[str, Any]) -> Calibration:
        """Return this calibration with more facts about where it comes from."""
        return replace(self, provenance=self.provenance | facts)

    def to(self, device: torch.device) -> Calibration:
        """Return this calibration with its parameters on another device."""
        return replace(self, params={site: params.to(device) for site, params in self.params.items()})

    def product(self, op_name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
        """Return a product of float operands with both quantized; shapes as in the graph."""
        operands = [
            self.plan.quantizers[key].fake_quantize(x, self.params[key])
            for key, x in ((site(op_name, "lhs"), lhs), (site(op_name, "rhs"), rhs))
        ]
        return self.plan.op(op_name).compute(operands[0], operands[1], bias)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration to one safetensors file, its plan and provenance as JSON in the header.

        Written under a temporary name and moved. Raises PTQError if the folder is not writable.
        """
        named = ((stored(key, role), x) for key, params in self.params.items() for role, x in params.tensors().items())
        tensors = {name: tensor.cpu() for name, tensor in named}
        axes = {key: params.axis for key, params in self.params.items()}
        names = ("distances", "snr", "shares", "without_gradient", "seconds", "provenance")
        record = {"axes": axes} | {name: getattr(self, name) for name in names}
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
            params=_params(plan, tensors, record["axes"]),
            distances={key: (value[0], value[1]) for key, value in record["distances"].items()},
            snr=record["snr"],
            shares=record.get("shares", {}),  # files of before have none
            without_gradient=tuple(record.get("without_gradient", ())),
            seconds=record["seconds"],
            provenance=record["provenance"],
        )

    def fingerprint(self) -> str:
        """Return a short hash of every parameter: equal calibrations have equal fingerprints."""
        digest = hashlib.sha256()
        for key in sorted(self.params):
            digest.update(key.encode())
            for tensor in self.params[key].tensors().values():
                digest.update(_bytes(tensor))
        return digest.hexdigest()[:16]

    def report(self) -> str:
        """Return a text table per site: scales, threshold, distances of the product, signal-to-noise ratio in dB.

        What is weak or was chosen without gradients follows below it, with every name.
        """
        lines = [f"{'site':44}{'scale':>24}{'threshold':>11}{'distance before':>17}{'after':>11}{'SNR':>8}"]
        for row in self.records():
            threshold = "" if row["threshold"] is None else f"{row['threshold']:.4g}"
            before, after = row["distance_before"], row["distance_after"]
            lines.append(
                f"{row['site']:44}{row['scale']:>24}{threshold:>11}{before:17.4g}{after:11.4g}{row['snr']:8.1f}"
            )
        return "\n".join([*lines, *(f"\n{remark.in_full()}" for remark in self.remarks())])

    def remarks(self) -> tuple[Remark, ...]:
        """Return what deserves a word; `calibrate` warns of it."""
        without = tuple(op.name for op in self.plan.ops if op.name in self.without_gradient)  # not in order of arrival
        return remarks(self.snr, self.shares, without)

    def records(self) -> list[dict[str, Any]]:
        """Return the rows of `report`, JSON-ready, a dictionary per site."""
        rows = []
        for key, params in self.params.items():
            quantizer = self.plan.quantizers[key]
            threshold = quantizer.threshold(params)
            before, after = self.distances.get(product_of(key), (math.nan, math.nan))
            rows.append(
                {
                    "site": key,
                    "quantizer": quantizer.describe(),
                    "scale": params.describe(),
                    "threshold": None if threshold is None else float(threshold),
                    "distance_before": before,
                    "distance_after": after,
                    "snr": self.snr.get(key, math.nan),
                }
            )
        return rows


def _params(plan: QuantPlan, tensors: dict[str, Tensor], axes: dict[str, int | None]) -> dict[Site, QParams]:
    """Return the parameters of every site of which there are tensors, in their order."""
    found: dict[Site, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, role = site_and_role(name)
        found.setdefault(key, {})[role] = tensor
    strange = next((key for key in found if key not in plan.quantizers), None)
    if strange is not None:
        do = "calibrate again with this version"
        raise failure("Calibration.load", strange, expected="a site of the plan in the same file", got="another", do=do)
    return {key: plan.quantizers[key].params_from(own, axes.get(key)) for key, own in found.items()}


def fingerprint_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a short hash of the values of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().resolve_neg().contiguous()
    bits = values.view(torch.int16) if values.dtype is torch.bfloat16 else values  # a type that NumPy has not
    return bits.numpy().tobytes()
