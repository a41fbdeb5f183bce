"""Losses whose gradient weighs the search: functions from the model's output to one scalar or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ptq4vit_fx.errors import PTQError, failure, unknown_name
from ptq4vit_fx.inputs.settings import LOSSES

#: From the model's output to a scalar, or to several: each is differentiated, and the squared gradients are averaged.
Loss = Callable[[Any], Tensor | Sequence[Tensor]]

#: Labels that `fisher` draws per image, and directions that `projection` does.
FISHER_DRAWS = 4

#: An output that is nearly zero has no direction.
SMALLEST_NORM = 1e-12


def get_loss(loss: str | Loss, seed: int) -> Loss:
    """Return the loss of this name, or the callable itself; raises PTQError on another name and on what is neither.

    A named loss starts its random numbers anew, so that two captures of the same images draw the same labels.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        expected, do = f"a function from the model's output to a scalar, or {' or '.join(LOSSES)}", "leave it out"
        raise failure("calibrate", "loss", expected=expected, got=repr(loss), do=do)
    if loss == "pseudo_label":
        return pseudo_label
    if loss == "fisher":
        return fisher(seed)
    if loss == "projection":
        return projection(seed)
    besides = ", or a function from the model's output to a scalar"
    raise unknown_name("calibrate", "loss", loss, LOSSES, besides=besides)


def pseudo_label(output: Any) -> Tensor:
    """Return sum CE(logits, argmax logits): the float model's own prediction is the label (PTQ4ViT, section 3.3).

    output: logits (batch, classes), at least two classes, or what holds them (see `_logits`). In float64, because
    1 - p of a certain model vanishes in float32. Raises PTQError on any other output.
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


def projection(seed: int = 0, draws: int = FISHER_DRAWS) -> Loss:
    """Return the loss sum v * z / |z|, z an image's output and v random signs, `draws` times.

    For outputs that are no logits: embeddings, tokens, maps. The expectation of the squared gradient is the squared
    change of the output's direction, which cosines and neighbours are made of; of several tensors each counts alike.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(output: Any) -> Sequence[Tensor]:
        found = [x.double().reshape(len(x), -1) for x in tree_leaves(output) if _is_float(x) and x.ndim > 0]
        units = [x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(SMALLEST_NORM) for x in found]
        if not units:
            do = "pass loss=, a function from the output to a scalar"
            raise failure("calibrate", "the model's output", expected="floats", got=described(output), do=do)
        signs = _signs(units, draws, generator)
        none = units[0].new_zeros(())
        return [sum(((x * v[:, d].to(x)).sum() for x, v in zip(units, signs, strict=True)), none) for d in range(draws)]

    return loss


def _signs(units: Sequence[Tensor], draws: int, generator: torch.Generator) -> list[Tensor]:
    """Return random signs for tensors (images, n), (images, draws, n) each, image by image: batches change nothing."""
    signs = [torch.empty(len(x), draws, x.shape[1]) for x in units]
    for image in range(max(map(len, signs))):
        for own in signs:
            if image < len(own):
                own[image] = 2 * torch.randint(0, 2, own.shape[1:], generator=generator) - 1
    return signs


def has_logits(output: Any) -> bool:
    """Return whether an output has what `pseudo_label` and `fisher` read."""
    try:
        _logits(output)
    except PTQError:
        return False
    return True


def loss_values(loss: Loss, output: Any, images: int) -> list[Tensor]:
    """Return the scalars that a loss gives for the output of so many images; one number per image is summed.

    Raises PTQError if the loss fails, or gives something else, or a value that is not finite.
    """
    try:
        returned = loss(output)
    except PTQError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        do = f"write it for the only argument that it is given, the output: {described(output)}"
        got = f"{type(error).__name__}: {reason}"
        raise failure("calibrate", "loss", expected="a function that gives a scalar", got=got, do=do) from error
    values = returned if isinstance(returned, (tuple, list)) else [returned]
    if not values:
        raise failure("calibrate", "loss", expected="a scalar or several", got="none", do="return one tensor or more")
    return [_scalar(value, images) for value in values]


def check_gradient(loss: Loss, output: Any, images: int) -> None:
    """Raise PTQError unless every value of a loss has a gradient by the output, wherever that comes from."""
    leaves = tree_map(lambda x: x.detach().clone().requires_grad_() if _is_float(x) else x, output)
    if not all(value.requires_grad for value in loss_values(loss, leaves, images)):
        raise failure(
            "calibrate",
            "loss",
            expected="a value with a gradient by the model's output",
            got="one that does not depend on it, or was detached",
            do="compute it by torch's operators, without .detach(), .item(), argmax or no_grad, from floats of the "
            f"output: {described(output)}",
        )


def described(output: Any) -> str:
    """Return what an output is, in a few words: names and shapes."""
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}" + ("" if output.is_floating_point() else f" of {output.dtype}")
    if isinstance(output, Mapping):
        return f"a dict with {', '.join(f'{name!r}, {described(x)}' for name, x in output.items())}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {', '.join(map(described, output))}"
    return type(output).__name__


def _scalar(value: Any, images: int) -> Tensor:
    """Return a value of a loss as a scalar; raises PTQError if it is none."""
    expected, do = (
        "a tensor of one number, or of one per image",
        "return the tensor itself, without .item() or .numpy()",
    )
    if not isinstance(value, Tensor):
        do = "end it with `return`" if value is None else do
        got = f"{type(value).__name__} {value:g}" if isinstance(value, (int, float)) else type(value).__name__
        got = "None" if value is None else got
    elif not value.is_floating_point():
        got, do = f"{value.dtype}", "return a float, computed from the output"
    elif value.numel() != 1 and value.shape != (images,):
        got, do = f"shape {tuple(value.shape)}", "return its sum, .sum()"
    elif not torch.isfinite(value.detach()).all():
        got, do = f"{float(value.detach().sum())}", "look at which output the loss has no finite value"
    else:
        return value.sum() if value.ndim else value
    raise failure("calibrate", "what loss= returned", expected=expected, got=got, do=do)


def _logits(output: Any) -> Tensor:
    """Return the logits of an output, (rows, classes) float64: those of a bare 2-D tensor, or what is named so.

    Of a mapping the entry `logits`, or the only one whose name has that word; its rows are images, queries (batch,
    queries, classes) or pixels (batch, classes, height, width). Of a tuple the only 2-D tensor. Raises PTQError on
    any other output.
    """
    named = output._asdict() if hasattr(output, "_asdict") else output
    found = [output]
    if isinstance(named, Mapping):
        found = [named["logits"]] if "logits" in named else [x for name, x in named.items() if "logits" in str(name)]
    elif isinstance(output, (tuple, list)):
        found = [x for x in output if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] > 1]
    logits = found[0] if len(found) == 1 and _is_float(found[0]) else None
    if logits is not None and logits.ndim > 2 and isinstance(named, Mapping):
        logits = (logits.movedim(1, -1) if logits.ndim > 3 else logits).flatten(0, -2)
    if logits is None or logits.ndim != 2 or logits.shape[1] < 2:
        do = "pass loss=, a function from the output to a scalar"
        if logits is not None and logits.ndim == 2:
            do += "; for one logit of two classes lambda x: torch.nn.functional.softplus(-x.abs()).sum()"
        got = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
        if isinstance(output, Tensor) and not output.is_floating_point():
            got = described(output)
            do = "return the scores themselves, not the comparison or the argmax of them"
        raise failure(
            "calibrate",
            "the model's output",
            expected="logits, a tensor (batch, classes) with two classes or more, or an entry of that name",
            got=got,
            do=do,
        )
    return logits.double()


def _is_float(x: Any) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.is_floating_point()
