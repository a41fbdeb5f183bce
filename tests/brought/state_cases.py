"""The state of a model and of torch: hooks, replaced forwards, modes."""

from __future__ import annotations

from brought import brought
from brought.pipeline import pictures, pipeline, vit


@brought("state", "a plain model of timm", quick=True)
def plain() -> None:
    pipeline(vit(), pictures())
