"""`report`: what is known of a file or a calibration, and what can be measured of it, as a value and a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import PTQError, check_extra, failure
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.metadata import CALIBRATION_KEY, PLAN_KEY, Figures, figures_of, provenance
from ptq4vit_fx.export.model_files import load_file, tensors_of, unreadable
from ptq4vit_fx.export.proof.compare_float import compare_float, inputs_of
from ptq4vit_fx.export.proof.inspection import inspect_file
from ptq4vit_fx.export.proof.latency import measure_latency
from ptq4vit_fx.export.proof.operator_times import operator_times
from ptq4vit_fx.export.report.content import Known, ProductEntry, Report
from ptq4vit_fx.export.report.products import (
    figures_of_calibration,
    products_of,
    stored_in_calibration,
    stored_in_file,
)
from ptq4vit_fx.export.report.seen import Seen, activations_seen, weights_seen
from ptq4vit_fx.export.stored_sites import stored_sites
from ptq4vit_fx.files import check_readable, check_writable, scratch
from ptq4vit_fx.inputs.batches import batches_of
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.names import Site
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.torch_state import independent_of_caller

OPERATION = "report"
#: Images on which histograms are measured, the first ones.
HISTOGRAM_IMAGES = 8


@independent_of_caller()
def report(
    subject: Calibration | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    data: Any = None,
    reference: nn.Module | str | os.PathLike[str] | None = None,
    images: int | None = None,
    names: Sequence[str] = (),
    unseen: bool | None = None,
    bench: bool = True,
    known: Known | None = None,
) -> Report:
    """Return what is known of a quantized model; with a path, write it there as one HTML page.

    subject: an ONNX file that `export_onnx` wrote, or a calibration, or its file. calibration: that of the file, for
    figures that files of before do not have. data, images: as for `calibrate`: histograms of every site are measured on
    the first HISTOGRAM_IMAGES, and all of them are compared with `reference`, the float model or its file. names: of
    the images. unseen: whether calibration has not seen them. bench: time the file, operator by operator, and beside
    float. known: what has been measured already.

    Raises PTQError on files that cannot be read, a calibration of another model, images that do not fit, a path that
    cannot be written, and, for a page, without matplotlib (extra `report`).
    """
    if path is not None:
        check_extra(OPERATION, "the page", "report", "matplotlib")
        _check_output(path, subject, calibration, reference)
    if isinstance(subject, Calibration) or is_calibration(subject):
        for name, given in (("calibration", calibration), ("data", data), ("reference", reference)):
            if given is not None:
                do = f"pass the ONNX file, or leave {name} out"
                raise failure(OPERATION, name, expected="an ONNX file that it goes with", got="a calibration", do=do)
        found = _of_calibration(subject, known or Known())
    else:
        found = _of_file(str(subject), calibration, known or Known())
        found = _measured(found, data, reference, images, names, unseen, bench=bench)
    if path is not None:
        found.save(path)
    return found


def _check_output(path: str | os.PathLike[str], *read: Any) -> None:
    """Raise PTQError if the page cannot be written, or would be written over what it is about."""
    check_writable(path, OPERATION)
    for file in (one for one in read if isinstance(one, (str, os.PathLike))):
        if os.path.realpath(file) == os.path.realpath(path):
            do = "give the page its own path"
            raise failure(OPERATION, "path", expected="another file than those it is about", got=str(path), do=do)


def is_calibration(path: str | os.PathLike[str]) -> bool:
    """Return whether a file starts as safetensors does: eight bytes of a length, then JSON. Raises PTQError on no file.

    An ONNX file starts with its version.
    """
    file = check_readable(path, OPERATION, "an ONNX file or a calibration")
    with file.open("rb") as opened:
        start = opened.read(9)
    return file.suffix == ".safetensors" or (start[8:] == b"{" and start[:1] != b"\x08")


def _of_calibration(subject: Calibration | str | os.PathLike[str], known: Known) -> Report:
    calibration = subject if isinstance(subject, Calibration) else Calibration.load(subject)
    name = "calibration" if isinstance(subject, Calibration) else str(subject)
    stored, figures = stored_in_calibration(calibration), figures_of_calibration(calibration)
    products = products_of(calibration.plan, stored, figures, {}, None)
    warnings = (*known.warnings, *(str(remark) for remark in calibration.remarks()))
    return Report(name, calibration.plan, products, replace(known, warnings=warnings), calibration.provenance)


def _of_file(path: str, calibration: Calibration | str | os.PathLike[str] | None, known: Known) -> Report:
    inspected = inspect_file(path)
    model = load_file(path)
    plan = QuantPlan.from_json(model.metadata_props[PLAN_KEY], OPERATION, path)
    facts = provenance(model.metadata_props, OPERATION, path)
    figures = figures_of(model.metadata_props, OPERATION, path)
    if calibration is not None:
        own = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
        figures = _figures_of_this(own, model, path)
    with unreadable(OPERATION, path, "a file that export_onnx wrote"):
        seen = weights_seen(stored_sites(model, OPERATION, path), plan)
        products = products_of(plan, stored_in_file(inspected), figures, seen, inspected)
    beside = sum(tensor.nbytes for tensor in tensors_of(model) if isinstance(tensor, ir.ExternalTensor))
    weights = sum(4 * tensor.size for tensor in tensors_of(model))
    size = os.path.getsize(path) + beside
    return Report(path, plan, products, known, facts, inspected, size, weights)


def _figures_of_this(calibration: Calibration, model: ir.Model, path: str) -> Figures:
    """Return the figures of a calibration; raises PTQError if the file was written from another one."""
    said = model.metadata_props.get(CALIBRATION_KEY, "none")
    if calibration.fingerprint() != said:
        got, do = calibration.fingerprint(), "pass the one that this file was written from, or leave it out"
        expected = f"the calibration of {path}, fingerprint {said}"
        raise failure(OPERATION, "calibration", expected=expected, got=got, do=do)
    return figures_of_calibration(calibration)


def _measured(
    found: Report,
    data: Any,
    reference: nn.Module | str | os.PathLike[str] | None,
    images: int | None,
    names: Sequence[str],
    unseen: bool | None,
    *,
    bench: bool,
) -> Report:
    """Return a report of a file with what data and float bring."""
    known = found.known
    if isinstance(reference, (str, os.PathLike)):
        load_file(reference)  # what cannot be read at all is no measurement that fails
    if data is not None:
        batches = batches_of(inputs_of(found.name, reference)[0], data, OPERATION, images=images)
        if reference is not None and known.against is None:
            against = compare_float(found.name, reference, _as_data(batches), names=names, unseen=unseen)
            known = replace(known, against=against)
        found = _with_histograms(found, batches)
    if bench:
        known = _timed(found.name, reference, known)
    return replace(found, known=known)


def _as_data(batches: list[Inputs]) -> Any:
    return [batch[0] if len(batch) == 1 else batch for batch in batches]


def _with_histograms(found: Report, batches: list[Inputs]) -> Report:
    first, count = [], 0
    for batch in batches:
        room = HISTOGRAM_IMAGES - count
        if room > 0:
            first.append(tuple(x[:room] for x in batch))
            count += len(first[-1][0])
    model = load_file(found.name)
    with unreadable(OPERATION, found.name, "the sites of its plan"):
        seen = activations_seen(model, stored_sites(model, OPERATION, found.name), found.plan, found.name, first)
    return replace(found, products=tuple(_with_seen(product, seen) for product in found.products), images_seen=count)


def _with_seen(product: ProductEntry, seen: dict[Site, Seen]) -> ProductEntry:
    lhs, rhs = (replace(entry, seen=seen.get(entry.site, entry.seen)) for entry in product.sites)
    return replace(product, sites=(lhs, rhs))


def _timed(path: str, reference: nn.Module | str | os.PathLike[str] | None, known: Known) -> Known:
    """Return what is known with times; that a measurement does not work out is no error, and is said."""
    try:
        known = replace(known, times=known.times or operator_times(path))
        if reference is None or known.float_times is not None:
            return known
        if not isinstance(reference, nn.Module):
            return _beside(path, reference, known)
        size = sum(tensor.nbytes for tensor in reference.state_dict().values())
        example = tuple(torch.zeros(1, *entry.shape, dtype=entry.dtype) for entry in inputs_of(path, reference)[0])
        with scratch(OPERATION, size) as folder:
            written = export_float(reference, folder / "float.onnx", example[0] if len(example) == 1 else example)
            return _beside(path, folder / "float.onnx", replace(known, float_bytes=written))
    except PTQError as error:
        return replace(known, why=f"not measured: {error}")


def _beside(path: str, float_file: str | os.PathLike[str], known: Known) -> Known:
    latency = known.latency or measure_latency(path, float_file)
    return replace(known, latency=latency, float_times=operator_times(float_file, images=latency.images))
