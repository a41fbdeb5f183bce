"""Gradients of a loss, the same to the last bit for every number of threads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4vit_fx.calibrating.losses import Loss, check_gradient, loss_values
from ptq4vit_fx.errors import failure


def differentiate(loss: Loss, output: Any, images: int) -> None:
    """Run backward from every value of the loss. Raises PTQError if there is no gradient, or no backward."""
    values = loss_values(loss, output, images)
    if not all(value.requires_grad for value in values):
        check_gradient(loss, output, images)  # else: no product that is captured reaches this value
    reached = [value for value in values if value.requires_grad]
    for number, value in enumerate(reached):
        again = number + 1 < len(reached)
        try:
            with SteadySoftmax():  # type: ignore[no-untyped-call]
                (value / len(values) ** 0.5).backward(retain_graph=again)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            expected, got = "operators with a derivative", (str(error).splitlines() or [""])[0]
            do = "change the loss, or keep that part of the model closed with leaf_modules="
            raise failure("calibrate", "backward from the loss", expected=expected, got=got, do=do) from error


class SteadySoftmax(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Let softmax be differentiated by operators whose last bits do not depend on the number of threads.

    torch's own kernel for processors (2.14) sums a row in another order in the thread that starts with it than in the
    others. Gradients weigh how weights are rounded, and a code on the edge would then follow the number of threads.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, or for the backward of softmax s * (g - sum(s * g)), s the output and g its gradient."""
        if func is not torch.ops.aten._softmax_backward_data.default or args[0].device.type != "cpu":
            return func(*args, **kwargs or {})
        gradient, output, dim, dtype = args
        return softmax_backward(gradient, output, dim).to(dtype)


def softmax_backward(gradient: Tensor, output: Tensor, dim: int) -> Tensor:
    """Return the gradient of the input of a softmax over `dim`, in the shape and dtype of its output."""
    weighted = gradient * output
    return weighted.addcmul_(output, weighted.sum(dim, keepdim=True), value=-1)
