"""Whether images for a calibration look like what a model was trained on; where not, a warning that says what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4vit_fx.errors import warn
from ptq4vit_fx.inputs.items import Input
from ptq4vit_fx.inputs.tensors import Inputs

#: Where a prepared model keeps the `Normalization` of the model that it was made from.
NORMALIZATION = "ptq4vit_normalization"

#: Fewer images choose scales by chance: the spread over choices of images falls little behind it (docs/calibration.md).
FEWEST = 16
#: Normalized images lie between -3 and 3, whatever mean and std; a byte does not.
BYTES_ABOVE = 20.0
#: Mean and standard deviation of all values of normalized images are well inside of these.
LARGEST_MEAN, SMALLEST_SPREAD, LARGEST_SPREAD = 3.0, 0.02, 5.0


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel that a model's images are normalized with, of values from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def black(self) -> float:
        """What the brightest black of all channels becomes."""
        return max(-mean / std for mean, std in zip(self.mean, self.std, strict=True))


def normalization_of(model: Any) -> Normalization | None:
    """Return what a timm model says in its `pretrained_cfg`; None of any other model, and of what is no such entry."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        return None
    mean, std = ((*value,) if isinstance(value := config.get(key), (tuple, list)) else () for key in ("mean", "std"))
    numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (*mean, *std))
    if not numbers or not mean or len(mean) != len(std) or min(std) <= 0:
        return None
    return Normalization(mean, std)


def warn_of_implausible(
    batches: Sequence[Inputs], wanted: Sequence[Input], operation: str, normalization: Normalization | None = None
) -> None:
    """Warn (PTQWarning) of too few images, and, once, of images that are equal or whose values are not usual.

    batches: of the inputs `wanted`. Values are looked at where an input is float, (images, 1 or 3 channels, height,
    width): of others nobody knows what is usual.
    """
    count = sum(len(batch[0]) for batch in batches)
    if count < FEWEST:
        few = f"{count} image{'s' * (count > 1)}, fewer than {FEWEST}"
        warn(f"{operation}: data: {few}: their scales are left to chance; pass 32, unlabelled ones will do")
    for place, entry in enumerate(wanted):
        if entry.dtype.is_floating_point and len(entry.shape) == 3 and entry.shape[0] in (1, 3):
            said = _implausible([batch[place] for batch in batches], normalization)
            if said:
                warn(f"{operation}: data: {said}")
            return


def _implausible(parts: Sequence[Tensor], normalization: Normalization | None) -> str:
    """Return what is not usual about images, and what to do; "" if they look normalized."""
    first = parts[0][:1]
    if sum(map(len, parts)) > 1 and all(bool((x == first).all()) for x in parts):
        return "all images are equal: scales fit that one alone; pass different ones"
    lowest, highest = (float(of(torch.stack([of(x) for x in parts]))) for of in (torch.min, torch.max))
    values = sum(x.numel() for x in parts)
    mean = sum(float(x.sum(dtype=torch.float64)) for x in parts) / values
    spread = math.sqrt(sum(float((x.double() - mean).square().sum()) for x in parts) / values)
    do = "prepare them as for the float model: divide by 255, subtract the mean, divide by the std"
    unless = "; if the model does that itself, all is well"
    found = f"values from {lowest:.3g} to {highest:.3g}, mean {mean:.3g}, standard deviation {spread:.3g}"
    if lowest >= 0 and highest > BYTES_ABOVE:
        return f"{found}: these look like bytes, not like normalized images; {do}{unless}"
    if normalization is not None and normalization.black < -0.5 and lowest >= 0 and highest <= 1 and spread > 0:
        norm = f"mean {_few(normalization.mean)}, std {_few(normalization.std)}"
        return f"{found}: not normalized, as the model's own configuration wants it ({norm}); {do}{unless}"
    if spread < SMALLEST_SPREAD or spread > LARGEST_SPREAD or abs(mean) > LARGEST_MEAN:
        return f"{found}: far from that of normalized images; {do}{unless}"
    return ""


def _few(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
