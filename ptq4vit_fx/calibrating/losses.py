"""Losses whose gradient weighs the search: functions from the model's output to one scalar or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vit_fx.errors import failure, unknown_name

#: From the model's output to a scalar, or to several: each is differentiated, and the squared gradients are averaged.
Loss = Callable[[Any], Tensor | Sequence[Tensor]]

#: Labels that `fisher` draws per image.
FISHER_DRAWS = 4

LOSSES = ("pseudo_label", "fisher")
DEFAULT_LOSS = "pseudo_label"


def get_loss(loss: str | Loss, seed: int) -> Loss:
    """Return the loss of this name, or the callable itself; raises PTQError on another name.

    A named loss starts its random numbers anew, so that two captures of the same images draw the same labels.
    """
    if not isinstance(loss, str):
        return loss
    if loss == "pseudo_label":
        return pseudo_label
    if loss == "fisher":
        return fisher(seed)
    besides = ", or a function from the model's output to a scalar"
    raise unknown_name("calibrate", "loss", loss, LOSSES, besides=besides)


def pseudo_label(output: Any) -> Tensor:
    """Return sum CE(logits, argmax logits): the float model's own prediction is the label (PTQ4ViT, section 3.3).

    output: logits (batch, classes), at least two classes. In float64, because 1 - p of a certain model vanishes in
    float32. Raises PTQError on any other output.
    """
    logits = _logits(output)
    return F.cross_entropy(logits, logits.argmax(-1), reduction="sum")


def fisher(seed: int = 0, draws: int = FISHER_DRAWS) -> Loss:
    """Return the loss sum CE(logits, y) for labels y drawn from the model's own prediction, `draws` times.

    The expectation of the squared gradient over y ~ softmax(logits) is the diagonal of the Fisher information,
    which is what the pseudo label approximates with the likeliest y alone. The draws of an image are
    systematic: one uniform number shifts an even grid over the distribution, so few draws cover it.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(output: Any) -> Sequence[Tensor]:
        logits = _logits(output)
        cumulative = logits.detach().softmax(-1).cumsum(-1).cpu()
        start = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator)
        grid = (start + torch.arange(draws)) / draws
        labels = torch.searchsorted(cumulative, grid).clamp_max(logits.shape[1] - 1).to(logits.device)
        return [F.cross_entropy(logits, labels[:, draw], reduction="sum") for draw in range(draws)]

    return loss


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        raise failure(
            "calibrate",
            "the model's output",
            expected="logits, a tensor (batch, classes) with two classes or more",
            got=str(tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__),
            do="pass loss=, a function from the output to a scalar",
        )
    return output.double()
