"""The observer node that stands behind every product: an identity that shows a recorder what went in and out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

#: recorder(op name, lhs, rhs, bias, out)
Recorder = Callable[[str, Tensor, Tensor, Tensor | None, Tensor], Tensor]


class ProductObserver(nn.Module):
    """Returns `out` unchanged; while a recorder is attached, hands it the product's operands and output."""

    def __init__(self, op_name: str) -> None:
        super().__init__()
        self.op_name = op_name
        self.recorder: Recorder | None = None

    def forward(self, lhs: Tensor, rhs: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        if self.recorder is None:
            return out
        return self.recorder(self.op_name, lhs, rhs, bias, out)

    def extra_repr(self) -> str:
        return self.op_name
