"""That the file computes what was simulated, as `quantize` proves it: on a few images, on all where they differ."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.export.proof.verify import VerifyReport, verify_onnx
from ptq4vit_fx.inputs.progress import Show

#: Images on which every bit of the output is compared first, and those of them on which every site's codes are.
FEW, FEW_LAYERS = 8, 1


def proved(path: str | os.PathLike[str], converted: GraphModule, batches: Sequence[Tensor], show: Show) -> VerifyReport:
    """Verify a file on the first batches of FEW images; on all, and more layers, unless every bit is the same there.

    A file with another constant or operator than the simulation differs on any image, at the site where it is wrong;
    what differs now and then, last bits of float operators and sums that saturate, is seen in the first outputs, and
    then counted on all images.
    """
    few = _first(batches)
    report = verify_onnx(path, converted, few, layers=FEW_LAYERS, progress=show)
    proven = report.same_functions.bit_equal == 1.0 and report.first_divergence is None and not report.saturating
    if proven or (len(few) == len(batches) and sum(map(len, few)) <= FEW_LAYERS):
        return report
    return verify_onnx(path, converted, batches, progress=show)


def _first(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the first batches, whole ones, that hold FEW images together."""
    taken, count = list[Tensor](), 0
    for batch in batches:
        taken.append(batch)
        count += len(batch)
        if count >= FEW:
            break
    return taken


def full_batches(pixels: Tensor, fixed: int | None, size: int) -> list[Tensor]:
    """Return images in batches that a file takes: of a fixed batch, the first images fill up the last one."""
    if fixed is None:
        return list(torch.split(pixels, size))
    count = -(-len(pixels) // fixed) * fixed
    return list(torch.split(pixels[torch.arange(count) % len(pixels)], fixed))
