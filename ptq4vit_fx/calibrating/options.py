"""What a calibration is asked for, where it runs, and what else is searched on the operands that it captures."""

from __future__ import annotations

import os
from collections.abc import Hashable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.fx import GraphModule

from ptq4vit_fx.calibrating.losses import Loss
from ptq4vit_fx.calibration import Calibration, SearchResult
from ptq4vit_fx.inputs.progress import Show
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.plan import QuantOp, QuantPlan


class FurtherSearch(Protocol):
    """Further searches of a product while its operands are in memory."""

    def left(self, op: QuantOp) -> dict[Hashable, QuantPlan]:
        """Return the plans by which a product is still to be searched, besides the calibration's own."""
        ...

    def add(self, op: QuantOp, key: Hashable, result: SearchResult, seconds: float) -> None:
        """Take what was found by one of these plans."""
        ...


@dataclass(frozen=True)
class CalibrationOptions:
    """The arguments of `ptq4vit_fx.calibrate`, which documents them.

    further: what else is searched. known: an earlier calibration, used as far as it is one of the same.
    """

    images: int | None
    seed: int
    progress: bool | Show
    device: torch.device | str | None
    search_device: torch.device | str | None
    loss: str | Loss
    memory_limit: int | None
    checkpoint: str | os.PathLike[str] | None
    sequential: bool
    executor: Executor | None = None
    groups: int | None = None
    further: FurtherSearch | None = None
    known: Calibration | None = None


def chosen_loss(prepared: GraphModule, loss: str | Loss | None) -> str | Loss:
    """Return the loss that `calibrate` is given, else that of the plan's recipe."""
    return plan_of(prepared).loss if loss is None else loss


@dataclass(frozen=True)
class Devices:
    """Where the model is before and after, where it runs meanwhile, and where products are searched."""

    home: torch.device
    model: torch.device
    search: torch.device

    @staticmethod
    def of(prepared: GraphModule, options: CalibrationOptions) -> Devices:
        home = next((p.device for p in prepared.parameters()), torch.device("cpu"))
        model = torch.device(options.device) if options.device is not None else home
        return Devices(home, model, torch.device(options.search_device or model))
