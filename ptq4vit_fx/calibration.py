"""A calibration: the parameters of every site, how they were found, and a file format for them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ptq4vit_fx.balances import ChannelAffine, balances_of, check_balances
from ptq4vit_fx.errors import PTQError, failure, quoted, reason_of, some_names, warn
from ptq4vit_fx.files import write_file
from ptq4vit_fx.inputs.records import Place, read_as, read_json
from ptq4vit_fx.inputs.sealed_tensors import bytes_of, read_sealed, sealed
from ptq4vit_fx.inputs.weight_codes import CODES, check_codes, codes_of
from ptq4vit_fx.names import OPERANDS, Site, product_of, site, site_and_role, stored
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import QParams
from ptq4vit_fx.remarks import Remark, remarks
from ptq4vit_fx.views.tabular import Tabular

FORMAT = "ptq4vit_fx calibration 2"
#: What files of before said. One bit that flips makes neither name of the other.
FORMAT_WITHOUT_DIGEST = "ptq4vit_fx calibration 1"


@dataclass(frozen=True)
class SearchResult:
    """Parameters of both operands, and what they do on all rows.

    distance_before is at the initial scales; a metric with gradients gives sum((dL/dout)^2 (out^ - out)^2) over the
    calibration images, which compares products with each other. snr: signal-to-noise ratio in dB, 10 log10(sum x^2 /
    sum (x^ - x)^2), of "lhs", "rhs" and "out"; infinite where quantization changes nothing. share: distance_after over
    the distance of an output of zeros. without_gradient: whether the metric wanted one and no gradient of the loss
    reached the product, so that plain squared error decided.

    codes: of a weight that was rounded by the Gram matrix, int8 of its shape in the graph; all figures but
    distance_before are of these codes. None: every value has its nearest code, as of any other operand.
    """

    lhs: QParams
    rhs: QParams
    distance_before: float
    distance_after: float
    snr: dict[str, float]
    share: float = 0.0
    without_gradient: bool = False
    codes: Tensor | None = None


@dataclass(frozen=True, repr=False)
class Calibration(Tabular):
    """Parameters per site, the plan that they belong to, what they do, and where they come from.

    distances: op name -> (at the initial scales, at the chosen scales), in the search's metric. snr: site, or op name
    for its output -> signal-to-noise ratio in dB. shares: op name -> distance over that of an output of zeros.
    without_gradient: the products that squared error decided although the metric wanted gradients. seconds: op name ->
    seconds of its search. provenance: JSON-ready facts: images, seed, fingerprints of images and weights, seconds,
    versions. balances: name of a balance of the plan -> its scales and shifts, which `params` stand on. codes: site of
    a weight -> its codes, int8 of its shape in the graph; of all other weights each value has its nearest code. A
    checkpoint is a calibration that lacks some sites.
    """

    plan: QuantPlan
    params: dict[Site, QParams]
    distances: dict[str, tuple[float, float]] = field(default_factory=dict)
    snr: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    without_gradient: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    balances: dict[Site, ChannelAffine] = field(default_factory=dict)
    codes: dict[Site, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.plan, QuantPlan) or not isinstance(self.params, dict):
            expected, do = "a QuantPlan and a dictionary, site -> parameters", "pass prepared.plan and that"
            got = f"{type(self.plan).__name__} and {type(self.params).__name__}"
            raise failure("Calibration", "plan and params", expected=expected, got=got, do=do)

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
            codes=self.codes | ({} if result.codes is None else {sites["rhs"]: result.codes}),
        )

    def with_provenance(self, facts: dict[str, Any]) -> Calibration:
        """Return this calibration with more facts about where it comes from."""
        return replace(self, provenance=self.provenance | facts)

    def to(self, device: torch.device) -> Calibration:
        """Return this calibration with its parameters and codes on another device."""
        params = {key: own.to(device) for key, own in self.params.items()}
        balances = {key: own.to(device) for key, own in self.balances.items()}
        codes = {key: own.to(device) for key, own in self.codes.items()}
        return replace(self, params=params, balances=balances, codes=codes)

    def product(self, op_name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
        """Return a product of float operands with both quantized; shapes as in the graph."""
        keys = [site(op_name, operand) for operand in OPERANDS]
        left = self.plan.quantizers[keys[0]].fake_quantize(lhs, self.params[keys[0]])
        right = self.rounded(keys[1])
        if right is None:
            right = self.plan.quantizers[keys[1]].fake_quantize(rhs, self.params[keys[1]])
        return self.plan.op(op_name).compute(left, right, bias)

    def rounded(self, key: Site) -> Tensor | None:
        """Return what the codes of a weight stand for, float32 of its shape in the graph; None if it has none.

        Its quantizer gives these codes back, bit for bit: an integer times a normal scale, over that scale, is off by
        two roundings of float32.
        """
        codes = self.codes.get(key)
        return None if codes is None else self.plan.quantizers[key].decode(codes, self.params[key])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration to one safetensors file, its plan and provenance as JSON in the header.

        The file has a digest of its content, and appears whole or not at all. Raises PTQError if it cannot be written,
        if the provenance is no JSON, and on parameters that `load` would refuse.
        """
        self.check("save calibration", "calibration")
        tensors = [(key, own.tensors()) for key, own in self.params.items()]
        tensors += [(key, own.tensors()) for key, own in self.balances.items()]
        tensors += [(key, {CODES: codes}) for key, codes in self.codes.items()]
        named = ((stored(key, role), x) for key, own in tensors for role, x in own.items())
        figures = {entry.name: getattr(self, entry.name) for entry in fields(_Record) if entry.name != "axes"}
        record = _Record(axes={key: params.axis for key, params in self.params.items()}, **figures)
        try:
            texts = {"format": FORMAT, "plan": self.plan.to_json(), "record": json.dumps(asdict(record))}
        except (TypeError, ValueError, RecursionError) as error:
            expected, do = "figures and a provenance that JSON can hold", "leave out what is neither text nor number"
            raise failure("save calibration", str(path), expected=expected, got=reason_of(error), do=do) from error
        place = Place("save calibration", "record", do="leave that out of the provenance")
        read_as(_Record, read_json(texts["record"], place), place)
        write_file(path, sealed(dict(named), texts), "save calibration")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `save` wrote; warns (PTQWarning) if it is of a version before files had a digest.

        Raises PTQError if it is missing, something else, damaged, or holds parameters that no calibration gives.
        """
        place = Place(
            "Calibration.load", str(path), do="check the path, or calibrate again: the file is not what was saved"
        )
        file = read_sealed(path, place)
        if file.texts.get("format") != (FORMAT if file.sealed else FORMAT_WITHOUT_DIGEST):
            found = quoted(file.texts.get("format")) + ("" if file.sealed else " without a digest")
            raise place.refusal(FORMAT, found)
        if file.texts.keys() != {"format", "plan", "record"}:
            raise place.refusal("a plan and a record", some_names(file.texts))
        plan = QuantPlan.from_json(file.texts["plan"], place.operation, f"{place.subject}: plan")
        at_record = place.at("record")
        record: _Record = read_as(_Record, read_json(file.texts["record"], at_record), at_record)
        figures = {entry.name: getattr(record, entry.name) for entry in fields(record) if entry.name != "axes"}
        balances, tensors = balances_of(plan.balances, file.tensors, place)
        codes, tensors = codes_of(tensors)
        params = _params(plan, tensors, record.axes, place)
        calibration = Calibration(plan, params, **figures, balances=balances, codes=codes)
        calibration.check(place.operation, place.subject)
        if not file.sealed:
            lacks = "has no digest, as files of before: damage would not be noticed; save it again"
            warn(f"{place.operation}: {place.subject} {lacks}")
        return calibration

    def check(self, operation: str, subject: str) -> None:
        """Raise PTQError on parameters that no calibration with this plan gives, and on figures of no product.

        operation, subject: what looks at it, and where it is from, for that error.
        """
        place = Place(operation, subject, do="calibrate again")
        for op in self.plan.ops:
            for operand in OPERANDS:
                key = site(op.name, operand)
                if key in self.params:
                    params, axis = self.params[key], op.scale_axis(operand)
                    self.plan.quantizers[key].check(params, place.at(key))
                    if params.axis not in (None, axis):
                        raise place.at(key).refusal(f"scales along the axis {axis}", f"along {params.axis}")
                elif op.name in self.distances:
                    raise place.at(key).refusal("parameters, as its product has a distance", "none")
        check_balances(self.plan.balances, self.balances, place)
        products = {op.name for op in self.plan.ops}
        for names, known in (
            (self.params, self.plan.quantizers.keys()),
            (self.snr, self.plan.quantizers.keys() | products),
            ((*self.distances, *self.shares, *self.without_gradient, *self.seconds), products),
        ):
            for strange in sorted(set(names) - known)[:1]:
                raise place.at(strange).refusal("a site or a product of the plan beside it", "another")
        check_codes(self.plan, self.params, self.codes, place)

    def fingerprint(self) -> str:
        """Return a short hash of every parameter and code: equal calibrations have equal fingerprints."""
        digest = hashlib.sha256()
        for key in sorted(self.params):
            digest.update(key.encode())
            for tensor in self.params[key].tensors().values():
                digest.update(bytes_of(tensor))
        for key in sorted(self.balances):
            for tensor in self.balances[key].tensors().values():
                digest.update(key.encode() + bytes_of(tensor))
        for key in sorted(self.codes):
            digest.update(stored(key, CODES).encode() + bytes_of(self.codes[key]))
        return digest.hexdigest()[:16]

    def report(self) -> str:
        """Return a text table per site: scales, threshold, distances of the product, signal-to-noise ratio in dB.

        The average bits, and what is weak or was chosen without gradients, follow below it, with every name.
        """
        lines = [f"{'site':44}{'scale':>24}{'threshold':>11}{'distance before':>17}{'after':>11}{'SNR':>8}"]
        for row in self.records():
            threshold = "" if row["threshold"] is None else f"{row['threshold']:.4g}"
            before, after = row["distance_before"], row["distance_after"]
            lines.append(
                f"{row['site']:44}{row['scale']:>24}{threshold:>11}{before:17.4g}{after:11.4g}{row['snr']:8.1f}"
            )
        average = [f"average bits: {self.plan.average_bits()}"] if self.plan.multiplications else []
        return "\n".join([*lines, *average, *(f"\n{remark.in_full()}" for remark in self.remarks())])

    def remarks(self) -> tuple[Remark, ...]:
        """Return what deserves a word; `calibrate` warns of it."""
        without = tuple(op.name for op in self.plan.ops if op.name in self.without_gradient)  # not in order of arrival
        return remarks(self.snr, self.shares, without)

    def brief(self) -> str:
        """Return how many sites are calibrated, on how many images."""
        sites = f"{len(self.params.keys() & self.plan.grids.keys())} of {len(self.plan.grids)} sites"
        return f"{sites}, {self.provenance.get('images', 'unknown')} images, recipe {self.plan.recipe}"

    def records(self) -> list[dict[str, Any]]:
        """Return the rows of `report`, JSON-ready, a dictionary per site."""
        rows = []
        for key, params in self.params.items():
            quantizer = self.plan.quantizers[key]
            threshold = quantizer.threshold(params)
            before, after = self.distances.get(product_of(key), (math.nan, math.nan))
            described: dict[str, Any] = {"site": key, "quantizer": quantizer.describe(), "scale": params.describe()}
            figures = {"distance_before": before, "distance_after": after, "snr": self.snr.get(key, math.nan)}
            rows.append(described | {"threshold": None if threshold is None else float(threshold)} | figures)
        return rows


@dataclass(frozen=True)
class _Record:
    """What a file says as JSON beside its plan; fields of `Calibration`, and the axis of every site's scales."""

    axes: dict[Site, int | None]
    distances: dict[str, tuple[float, float]]
    snr: dict[str, float]
    seconds: dict[str, float]
    provenance: dict[str, Any]
    shares: dict[str, float] = field(default_factory=dict)  # files of before have none
    without_gradient: tuple[str, ...] = ()


def _params(
    plan: QuantPlan, tensors: dict[str, Tensor], axes: dict[str, int | None], place: Place
) -> dict[Site, QParams]:
    """Return the parameters of every site of which there are tensors, in their order."""
    found: dict[Site, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, role = site_and_role(name)
        found.setdefault(key, {})[role] = tensor
    for strange in sorted(found.keys() - plan.quantizers.keys()):
        raise place.at(strange).refusal("a site of the plan in the same file", "another")
    for strange in sorted(axes.keys() - plan.quantizers.keys()):
        raise place.at(strange).refusal("a site of the plan in the same file", "another")
    for without in sorted(found.keys() - axes.keys()):
        raise place.at(without).refusal("an axis beside its tensors", "none")
    try:
        return {key: plan.quantizers[key].params_from(found.get(key, {}), axis) for key, axis in axes.items()}
    except PTQError as error:
        raise place.with_reason(error) from error


def fingerprint_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a short hash of the values of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]
