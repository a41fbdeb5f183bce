"""`quantize --agreement` and `--twins auto`: what `tune` is asked for, and the images that it measures on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ptq4vit_fx.api import calibrate
from ptq4vit_fx.errors import failure, unknown_name
from ptq4vit_fx.export.proof.against_float import Kind
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.traced_module import TracedModule
from ptq4vit_fx.quantizers import FLOAT_BITS
from ptq4vit_fx.tools.held_out import Compared
from ptq4vit_fx.tools.terminal import forms_beside
from ptq4vit_fx.tuning.timings import load_timings
from ptq4vit_fx.tuning.tune import tune
from ptq4vit_fx.twins import choose_twins, products_with_twins

if TYPE_CHECKING:
    from ptq4vit_fx.tools.request import Request

#: What --minimize calls the quantities of `tune`.
MINIMIZED = {"time": "time", "size": "size", "bits": "average bits"}


def check_tuning(request: Request) -> None:
    """Raise PTQError on options of tuning that exclude others, and on timings that cannot be read."""
    if request.minimize not in MINIMIZED:
        raise unknown_name("quantize", "--minimize", request.minimize, MINIMIZED)
    if request.twins == "auto" and request.agreement is None and request.sequential:
        expected, do = "exact, wide or uniform with --sequential", "choose one: auto compares products that do not wait"
        raise failure("quantize", "--twins", expected=expected, got="'auto'", do=do)
    if request.agreement is None:
        given = [("--minimize", request.minimize != "time"), ("--timings", request.timings is not None)]
        for option in (name for name, there in given if there):
            do = "add --agreement 0.99"
            raise failure("quantize", option, expected="an agreement to keep", got="none", do=do)
        return
    if not 0 < request.agreement <= 1:
        do, got = "ask for 0.99 of the classes", f"{request.agreement:g}"
        expected = "a share above 0 and at most 1, which float itself has"
        raise failure("quantize", "--agreement", expected=expected, got=got, do=do)
    if request.twins != "exact" or request.recipe == "base":
        expected, do = "--twins exact and another recipe than base, as tuning decides", "leave these options out"
        got = f"--twins {request.twins} --recipe {request.recipe}"
        raise failure("quantize", "--agreement", expected=expected, got=got, do=do)
    bits = [setting for setting in request.settings if not setting.endswith("=float")]
    if bits:
        do = "leave out --set of bits, or --agreement"
        raise failure("quantize", "--set", expected="bits that --agreement decides", got=bits[0], do=do)
    if request.timings is not None:
        load_timings(request.timings, "quantize")


def default_twins(recipe: str, agreement: float | None, *, sequential: bool) -> str:
    """Return what --twins is where nobody says it: auto where it can be, which the paper's own recipes are not."""
    return "auto" if recipe == "best" and agreement is None and not sequential else "exact"


def with_chosen_twins(
    request: Request,
    prepared: TracedModule,
    batches: list[torch.Tensor],
    compared: Compared | None,
    say: Callable[[str], None],
    kind: Kind | None,
    **calibrate_kwargs: Any,
) -> TracedModule:
    """Return the calibrated model with uniform quantizers in the place of the twins that it can do without.

    `--twins auto`: see `choose_twins`. Where there are no images that calibration does not take all twins stay, and it
    is said. The checkpoint ends as the scales of the file; what is searched on the way is kept beside it.
    """
    checkpoint, twins = request.checkpoint, bool(products_with_twins(plan_of(prepared)))
    if not twins or compared is None or not compared.unseen:
        calibrate(prepared, batches, checkpoint=checkpoint, **calibrate_kwargs)
        if twins:
            reason = "none" if compared is None else compared.reason
            say(f"twins: all exact, as images that calibration does not take are needed to choose, and {reason}")
        return prepared
    chosen, report = choose_twins(
        prepared,
        batches,
        held_out=list(torch.split(compared.pixels, request.batch_size)),
        target=request.target,
        opset=request.opset,
        kind=kind,
        cache=None if checkpoint is None else forms_beside(checkpoint),
        **calibrate_kwargs,
    )
    if checkpoint is not None and chosen.calibration is not None:
        chosen.calibration.save(checkpoint)
    say(f"twins: {report.headline()}")
    return chosen


def tuned_model(
    request: Request,
    prepared: GraphModule,
    batches: list[torch.Tensor],
    compared: Compared | None,
    say: Callable[[str], None],
    **calibrate_kwargs: Any,
) -> TracedModule:
    """Return the model with the plan that keeps the agreement; raises PTQError if no image is left to measure on."""
    if compared is None or not compared.unseen:
        reason = "none" if compared is None else compared.reason
        do = "put more images into the folder, or take fewer with --images"
        expected = "images that calibration does not take"
        raise failure("quantize", "--agreement", expected=expected, got=reason, do=do)
    bits = f"w{request.w_bits}a{request.a_bits}"
    quantity = MINIMIZED[request.minimize]
    forms = [bits, f"{bits} uniform", "float"] if quantity == "time" else None
    if request.a_bits == FLOAT_BITS:
        forms = [bits, "w8a32", "float"]
    tuned = tune(
        prepared,
        batches,
        held_out=list(torch.split(compared.pixels, request.batch_size)),
        agreement=request.agreement,
        minimize=quantity,
        target=request.target,
        opset=request.opset,
        batch=request.batch,
        forms=forms,
        timings=request.timings,
        cache=None if request.checkpoint is None else forms_beside(request.checkpoint),
        **calibrate_kwargs,
    )
    say(tuned.report())
    return tuned.prepared
