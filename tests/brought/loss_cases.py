"""Losses and outputs as people have them: what a loss returns, and where the logits are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, vit


class Wrapped(nn.Module):
    """A ViT whose output is made into something else."""

    def __init__(self, wrap: Callable[[Tensor], Any], classes: int = 7) -> None:
        super().__init__()
        self.net, self.wrap = vit(num_classes=classes), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


class Output(NamedTuple):
    logits: Tensor
    features: Tensor


def fingerprint(
    loss: Any = "pseudo_label", wrap: Callable[[Tensor], Any] = lambda x: x, classes: int = 7, recipe: Any = QUICK
) -> str:
    """Return the fingerprint of the scales that a loss gives on a ViT with this output."""
    prepared = ptq.prepare_fx(Wrapped(wrap, classes).eval(), recipe, pictures(1))
    return ptq.calibrate(prepared, pictures(), loss=loss, progress=False).fingerprint()


def error(x: Tensor) -> Tensor:
    """The pseudo label's loss as one's own, for logits (rows, classes)."""
    return F.cross_entropy(x.double(), x.argmax(-1), reduction="none")


@brought("task", "a loss per image, several losses, a scalar of one dimension", quick=True)
def losses_that_work() -> None:
    right = fingerprint()
    assert right == fingerprint(lambda x: error(x).sum())
    assert right == fingerprint(error)
    assert right == fingerprint(lambda x: error(x).sum()[None])
    assert right == fingerprint(lambda x: (error(x[:, :]).sum(),))
    assert right != fingerprint(lambda x: [x.square().sum(), error(x).sum()])


@brought("task", "logits under their name, in a tuple, beside other outputs", quick=True)
def logits_elsewhere() -> None:
    right = fingerprint()
    outputs: list[Callable[[Tensor], Any]] = [
        lambda x: {"logits": x, "boxes": x[:, :4] * 2},
        lambda x: {"class_logits": x, "boxes": x[:, :4] * 2},
        lambda x: (x, x[:, None] * 2),
        lambda x: [x, x[:, 0]],
        lambda x: Output(x, x * 2),
    ]
    for wrap in outputs:
        assert fingerprint(wrap=wrap) == right
        fingerprint("fisher", wrap)


@brought("task", "logits of queries, and of pixels", quick=True)
def dense_logits() -> None:
    queries = lambda x: {"logits": x.unflatten(1, (4, 3)), "boxes": x}  # noqa: E731
    pixels = lambda x: {"logits": x.unflatten(1, (3, 2, 2)), "boxes": x}  # noqa: E731
    assert fingerprint(wrap=queries, classes=12) == fingerprint(
        lambda out: error(out["logits"].flatten(0, 1)).sum(), queries, 12
    )
    assert fingerprint(wrap=pixels, classes=12) == fingerprint(
        lambda out: error(out["logits"].movedim(1, -1).flatten(0, 2)).sum(), pixels, 12
    )


@brought(
    "task", "one logit of two classes", refused="for one logit of two classes lambda x: torch.nn.functional.softpl"
)
def one_logit() -> None:
    softplus = fingerprint(lambda x: F.softplus(-x.abs()).sum(), classes=1)
    assert softplus == fingerprint(
        lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).float(), reduction="sum"), classes=1
    )
    fingerprint(classes=1)


@brought("task", "a loss that returns all logits", refused="got shape (6, 7); return its sum, .sum()")
def loss_of_logits() -> None:
    fingerprint(lambda x: x * 2)


@brought(
    "task", "a loss without return", refused="what loss= returned: expected a tensor of one number, or of one per i"
)
def loss_without_return() -> None:
    fingerprint(lambda x: None)


@brought(
    "task", "a loss that returns a number of Python", refused="got float 3; return the tensor itself, without .item()"
)
def loss_of_python() -> None:
    fingerprint(lambda x: 3.0)


@brought(
    "task", "a loss that returns an array", refused="got ndarray; return the tensor itself, without .item() or .nump"
)
def loss_of_numpy() -> None:
    fingerprint(lambda x: error(x).detach().sum(0, keepdim=True).numpy())


@brought(
    "task", "a detached loss", refused="got one that does not depend on it, or was detached; compute it", quick=True
)
def loss_detached() -> None:
    fingerprint(lambda x: error(x.detach()).sum())


@brought("task", "a loss under no_grad", refused="expected a value with a gradient by the model's output")
def loss_without_grad() -> None:
    fingerprint(torch.no_grad()(lambda x: error(x).sum()))


@brought("task", "a loss of integers", refused="got torch.int64; return a float, computed from the output")
def loss_of_integers() -> None:
    fingerprint(lambda x: x.argmax(-1).sum())


@brought("task", "a loss of a model's class numbers", refused="from floats of the output: a tensor (6,) of torch.int64")
def loss_of_classes() -> None:
    fingerprint(lambda x: x.float().sum(), lambda x: x.argmax(-1))


@brought("task", "a loss that is not finite", refused="got nan; look at which output the loss has no finite value")
def loss_not_finite() -> None:
    fingerprint(lambda x: (x - x).log().sum() * 0)


@brought(
    "task", "a loss that asks for another output", refused="got KeyError: 'logits'; write it for the only argument"
)
def loss_of_another_output() -> None:
    fingerprint(lambda out: out["logits"].sum(), lambda x: {"scores": x, "boxes": x})


@brought("task", "a criterion that needs labels", refused="the output: a tensor (6, 7)")
def criterion() -> None:
    fingerprint(nn.CrossEntropyLoss())


@brought("task", "None as loss: the recipe's")
def none_as_loss() -> None:
    assert fingerprint(None) == fingerprint("pseudo_label")
    assert fingerprint(None, recipe=QUICK.with_loss("projection")) == fingerprint("projection")


@brought(
    "task",
    "a number as loss",
    refused="expected a function from the model's output to a scalar, or pseudo_label or fis",
)
def number_as_loss() -> None:
    fingerprint(3)


@brought("task", "a recipe's loss of an unknown name", refused="got 'projections'; did you mean projection?")
def recipe_of_unknown_loss() -> None:
    QUICK.with_loss("projections")


@brought("task", "no loss at all in a tuple", refused="loss: expected a scalar or several, got none")
def empty_losses() -> None:
    fingerprint(lambda x: ())


@brought("task", "a loss that reads one of two outputs, in small groups of products")
def loss_of_one_head() -> None:
    def heads(x: Tensor) -> Any:
        return {"scores": x, "boxes": x[:, :4] * 2}

    for loss in (lambda out: out["scores"].square().sum(), lambda out: out["boxes"].square().sum()):
        prepared = ptq.prepare_fx(Wrapped(heads).eval(), QUICK, pictures(1))
        ptq.calibrate(prepared, pictures(), loss=loss, progress=False, memory_limit=160 << 20)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head, self.side = vit(num_classes=0), nn.Linear(48, 7), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.net(x)
        return {"logits": self.head(x), "boxes": self.side(x)}


@brought("task", "a head that the loss does not read")
def unread_head() -> None:
    model = TwoHeads().eval()
    for sequential in (False, True):  # sequential: each product is captured alone
        prepared = ptq.prepare_fx(model, QUICK, pictures(1))
        ptq.calibrate(prepared, pictures(), progress=False, sequential=sequential)
