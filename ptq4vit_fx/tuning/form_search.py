"""Calibrations of every form from one capture: the cost of a form is a search, not a pass over the images."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ptq4vit_fx.calibrating.calibrator import empty_calibration, resumed, run_calibration
from ptq4vit_fx.calibrating.group_tasks import check_work
from ptq4vit_fx.calibrating.options import CalibrationOptions, chosen_loss
from ptq4vit_fx.calibration import Calibration, SearchResult
from ptq4vit_fx.errors import failure
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.contract import attach, calibration_of, plan_of, sharing_tensors
from ptq4vit_fx.passes.graph.staged_model import calibrated_alone
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.tuning.forms import FLOAT, Candidates, Form

#: The arguments of `calibrate` that say what is searched; the others are its own.
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "progress": True,
    "device": None,
    "search_device": None,
    "loss": None,
    "memory_limit": None,
    "sequential": False,
    "executor": None,
    "groups": None,
}


@dataclass
class FormSearch:
    """The forms beside the first one, a calibration each, of the products for which they differ.

    folder: where each is kept as soon as one more product is found.
    """

    found: dict[Form, Calibration]
    folder: Path | None

    def left(self, op: QuantOp) -> dict[Hashable, QuantPlan]:
        """Return the plans of the forms of a product that have no scales yet."""
        return {
            form: own.plan for form, own in self.found.items() if op in own.plan.ops and op.name not in own.distances
        }

    def add(self, op: QuantOp, key: Hashable, result: SearchResult, seconds: float) -> None:
        """Take what was found of a form, and keep it."""
        assert isinstance(key, Form)
        self.found[key] = self.found[key].with_result(op.name, result, seconds)
        if self.folder is not None:
            self.found[key].save(path_of(self.folder, key))


def path_of(folder: Path, form: Form) -> Path:
    """Return the file of a form's calibration."""
    return folder / f"{form.name.replace(' ', '_')}.safetensors"


def search_forms(
    prepared: GraphModule, batches: list[Inputs], candidates: Candidates, folder: Path | None, **given: Any
) -> dict[Form, Calibration]:
    """Return the calibration of every quantized form: the first of all products, the others where they differ.

    given: arguments of `calibrate`. folder: what is there is not searched again. Raises PTQError as `calibrate` does.
    """
    unknown = sorted(given.keys() - DEFAULTS.keys())
    if unknown:
        do = f"pass those of calibrate: {', '.join(DEFAULTS)}"
        raise failure("tune", unknown[0], expected="an argument of calibrate", got="another", do=do)
    first, *others = (form for form in candidates.forms if form != FLOAT)
    base = planned(prepared, candidates.plan_of(first))
    arguments = DEFAULTS | given
    arguments["loss"] = chosen_loss(prepared, arguments["loss"])
    options = CalibrationOptions(images=None, checkpoint=folder and path_of(folder, first), **arguments)
    check_work(options)
    found = {
        form: _started(planned(prepared, candidates.plan_of(form)), batches, options, folder, form) for form in others
    }
    further = FormSearch(found, folder)
    with calibrated_alone(base):
        known = replace(options, further=further, known=calibration_of(prepared))
        calibration = run_calibration(base, batches, known)
    return {first: calibration} | further.found


def _started(
    prepared: GraphModule, batches: list[Inputs], options: CalibrationOptions, folder: Path | None, form: Form
) -> Calibration:
    empty = empty_calibration(prepared, batches, options)
    return empty if folder is None else resumed(prepared, empty, path_of(folder, form))


def planned(prepared: GraphModule, plan: QuantPlan) -> GraphModule:
    """Return a model with another plan of its products, sharing its tensors; what the plan lacks will be float."""
    assert set(plan.ops) <= set(plan_of(prepared).ops)
    return attach(sharing_tensors(prepared), plan=plan, calibration=None)
