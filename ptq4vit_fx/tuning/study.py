"""`sensitivity`: the forms of every product searched on some images, and measured on others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.calibration import Calibration, fingerprint_tensors
from ptq4vit_fx.errors import failure, unknown_name
from ptq4vit_fx.export.contract import Target
from ptq4vit_fx.export.proof.against_float import Kind
from ptq4vit_fx.export.targets import TARGETS
from ptq4vit_fx.inputs.batches import BATCH_SIZE, FIXED_BATCH, batches_for
from ptq4vit_fx.inputs.progress import Show
from ptq4vit_fx.inputs.sealed_tensors import bytes_of
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.staged_model import model_at
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.torch_state import independent_of_caller
from ptq4vit_fx.tuning.form_search import search_forms
from ptq4vit_fx.tuning.forms import DEFAULT_FORMS, Candidates, Form, candidates_of, form_of, held_forms
from ptq4vit_fx.tuning.measuring import PASS_IMAGES, Measuring
from ptq4vit_fx.tuning.sensitivity import DEFAULT_PASSES, Sensitivity, images_that_fit, measure, predicted

#: Images that a calibration takes of those that are given, at most, and that must be left for measuring.
CALIBRATED, FEWEST = 32, 8


@dataclass(frozen=True)
class Images:
    """Batches to calibrate on, others to measure on, and the labels of these, (images,) int64, if there are any."""

    calibrated: list[Inputs]
    held_out: list[Inputs]
    labels: Tensor | None = None


@dataclass
class Study:
    """What is known of a prepared model's forms: calibrations of all of them, costs, and the means to measure more.

    measuring: on all images that are held out, what the whole model does; few: on as many of them as leave
    room to measure everything, what a product alone does, once somebody asks: of the products `among` them, in `passes`
    forward passes. folder: that keeps it.
    """

    prepared: GraphModule
    candidates: Candidates
    found: dict[Form, Calibration]
    measuring: Measuring
    few: Measuring
    sensitivity: Sensitivity
    among: frozenset[str]
    passes: float
    folder: Path | None
    progress: bool | Show

    def measure_all(self) -> None:
        """Measure each product alone, as many forms as the passes allow, or take what the folder has of it."""
        known = None if self.folder is None else Sensitivity.load(self.folder)
        if known is None or known.identity != self.sensitivity.identity:
            known = measure(
                self.sensitivity, self.few, self.found, passes=self.passes, among=self.among, progress=self.progress
            )
            if self.folder is not None:
                known.save(self.folder)
        self.sensitivity = known

    def measure(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Measure these (product, form) too."""
        self.sensitivity = measure(self.sensitivity, self.few, self.found, wanted=pairs, progress=False)


@independent_of_caller()
def sensitivity(
    prepared: GraphModule,
    data: Any,
    *,
    held_out: Any = None,
    forms: Sequence[str] | None = None,
    target: str = "onnxruntime",
    passes: float = DEFAULT_PASSES,
    kind: Kind | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | Show = True,
    **calibrate_kwargs: Any,
) -> Sensitivity:
    """Return what every product of a prepared model costs in every form that the target can run.

    data: as for `calibrate`. held_out: others, to measure on; by default those of `data` behind the first half, of
    which at most 32 are calibrated on. forms: `w8a8`, `w8a8 uniform`, `w4a8` and so on, of the model's own recipe in
    other bits; by default those that `tune` tries for time. passes: forward passes of 32 images that measuring may
    take. cache: a folder that keeps all calibrations and the table; what is there is not done again. The other
    arguments are those of `calibrate`; the workers of its `executor` search, and measure products, a batch each. Raises
    PTQError if no images are left to measure on, if the target cannot hold a form, and as `calibrate` does.
    """
    chosen = None if forms is None else tuple(form_of(name, "sensitivity") for name in forms)
    images = split_images(prepared, data, held_out, None, "sensitivity")
    known = study(
        prepared,
        images,
        held_forms(chosen or DEFAULT_FORMS["time"], target_of(target, "sensitivity"), "sensitivity"),
        passes=passes,
        kind=kind,
        cache=cache,
        progress=progress,
        **calibrate_kwargs,
    )
    known.measure_all()
    return known.sensitivity


def study(
    prepared: GraphModule,
    images: Images,
    forms: tuple[Form, ...],
    *,
    passes: float = DEFAULT_PASSES,
    kind: Kind | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | Show = True,
    choices_only: bool = False,
    **calibrate_kwargs: Any,
) -> Study:
    """Search; see `sensitivity`. choices_only: what is measured later is products that have more than one form."""
    prepared = model_at(Stage.OBSERVED, prepared, "tune", "call prepare_fx first")
    check_distances(prepared)
    folder = None if cache is None else _folder(cache)
    candidates = candidates_of(prepared, forms)
    found = search_forms(prepared, images.calibrated, candidates, folder, progress=progress, **calibrate_kwargs)
    first = next(iter(found.values()))
    measuring = Measuring.of(prepared, first, images.held_out, kind, images.labels, calibrate_kwargs.get("executor"))
    count = sum(len(batch[0]) for batch in images.calibrated)
    table = predicted(found, candidates, count)
    order = {op.name: place for place, op in enumerate(candidates.plan.ops)}
    among = frozenset(name for name, own in candidates.pairs.items() if len(own) > 1 or not choices_only)
    costs = [cost for cost in table.costs if cost.product in among]
    few = measuring.on_few(images_that_fit(costs, order, passes, min(measuring.images, PASS_IMAGES)))
    identity = {
        "forms": [form.name for form in found],
        "held_out": fingerprint_tensors(x for batch in images.held_out for x in batch),
        "calibrations": [own.fingerprint() for own in found.values()],
        "kind": kind,
        "passes": passes,
        "measured": sorted(among),
    }
    known = replace(table, identity=identity)
    return Study(prepared, candidates, found, measuring, few, known, among, passes, folder, progress)


def target_of(name: str, operation: str) -> Target:
    """Return the target of that name; raises PTQError, with near names, if there is none."""
    if name not in TARGETS:
        raise unknown_name(operation, "target", name, TARGETS)
    return TARGETS[name]


def check_distances(prepared: GraphModule, operation: str = "tune") -> None:
    """Raise PTQError unless the distances of a model's searches compare products with each other."""
    metrics = {search.metric for search in plan_of(prepared).searches.values()}
    if metrics != {"hessian"}:
        do, got = "prepare with the metric hessian", ", ".join(sorted(metrics))
        raise failure(operation, "plan", expected="distances that compare products", got=got, do=do)


def split_images(prepared: GraphModule, data: Any, held_out: Any, labels: Any, operation: str) -> Images:
    """Return the images to calibrate on, and others; labels: of `held_out`, or of all of `data` without it.

    Raises PTQError if fewer than FEWEST are left to measure on that calibration does not see, and on labels of another
    length.
    """
    prepared = model_at(Stage.OBSERVED, prepared, operation, "call prepare_fx first")
    batches, fixed = batches_for(prepared, data, operation), int(prepared.meta.get(FIXED_BATCH) or 1)
    given = sum(len(batch[0]) for batch in batches)
    if held_out is None:
        count = min(CALIBRATED, given // 2) // fixed * fixed
        calibrated, others = _parts(batches, 0, count), _parts(batches, count, given)
    else:
        calibrated, others, count = batches, batches_for(prepared, held_out, operation), 0
    left = sum(len(batch[0]) for batch in others)
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.shape != (count + left,):
            do = "pass one class number for each image"
            expected, got = f"{count + left}, one of each image", f"shape {tuple(labels.shape)}"
            raise failure(operation, "labels", expected=expected, got=got, do=do)
        labels = labels[count:]
    seen = {_bytes(row) for batch in calibrated for row in zip(*batch, strict=True)}
    rows = [row for batch in others for row in zip(*batch, strict=True)]
    kept = [place for place, row in enumerate(rows) if _bytes(row) not in seen]
    if len(kept) < FEWEST:
        do = "pass more images, or others as held_out="
        expected = f"{FEWEST} images or more that calibration does not see"
        got = f"{len(kept)} of {given if held_out is None else left}"
        raise failure(operation, "held_out", expected=expected, got=got, do=do)
    kept = kept[: len(kept) // fixed * fixed]
    columns = tuple(torch.stack(column) for column in zip(*(rows[place] for place in kept), strict=True))
    size = fixed if fixed > 1 else BATCH_SIZE
    batches = list(zip(*(torch.split(column, size) for column in columns), strict=True))
    return Images(calibrated, batches, None if labels is None else labels[kept])


def _parts(batches: list[Inputs], start: int, stop: int) -> list[Inputs]:
    """Return images from `start` to `stop`, in batches as they were."""
    found, place = list[Inputs](), 0
    for batch in batches:
        size = len(batch[0])
        low, high = max(start - place, 0), min(stop - place, size)
        if low < high:
            found.append(tuple(x[low:high] for x in batch))
        place += size
    return found


def _bytes(row: Sequence[Tensor]) -> bytes:
    return b"".join(bytes_of(x) for x in row)


def _folder(cache: str | os.PathLike[str]) -> Path:
    path = Path(cache)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        do = "choose another path"
        raise failure("tune", str(path), expected="a folder to write into", got=str(error), do=do) from error
    return path
