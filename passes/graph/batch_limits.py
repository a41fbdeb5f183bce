"""Where torch.export stops to take the batch for any number: at a constant, or at a condition on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ptq4vit_fx.passes.graph.places import Frames, frames_here

Place = TypeVar("Place")


@dataclass
class BatchLimits(Generic[Place]):
    """Places where a size became a constant, and where a condition on a size was decided, in their order."""

    constants: list[Place] = field(default_factory=list)
    conditions: list[Place] = field(default_factory=list)

    @property
    def first(self) -> Place | None:
        """The place that tells most, None if there is none."""
        return next(iter(self.constants + self.conditions), None)


@contextlib.contextmanager
def batch_limits(where: Callable[[Frames], Place]) -> Iterator[BatchLimits[Place]]:
    """Give the limits that torch.export meets meanwhile; where: the place of the frames that are running."""
    limits = BatchLimits[Place]()
    replace, guard = ShapeEnv._set_replacement, ShapeEnv._log_guard

    def replacing(self: ShapeEnv, symbol: Any, target: Any, message: str) -> None:
        if target.is_number:
            limits.constants.append(where(frames_here()))
        replace(self, symbol, target, message)

    def guarding(self: ShapeEnv, *args: Any, **kwargs: Any) -> None:
        limits.conditions.append(where(frames_here()))
        guard(self, *args, **kwargs)

    setattr(ShapeEnv, "_set_replacement", replacing)  # noqa: B010 - a method, to mypy
    setattr(ShapeEnv, "_log_guard", guarding)  # noqa: B010
    try:
        yield limits
    finally:
        setattr(ShapeEnv, "_set_replacement", replace)  # noqa: B010
        setattr(ShapeEnv, "_log_guard", guard)  # noqa: B010
