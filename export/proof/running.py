"""A file that is open in some runtime: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ptq4vit_fx.export.nodes import Array


@dataclass(frozen=True)
class Opened:
    """name: what the runtime calls itself, with its version. run: the file's inputs, in its order, to its outputs."""

    name: str
    run: Callable[[Sequence[Array]], list[Array]]
