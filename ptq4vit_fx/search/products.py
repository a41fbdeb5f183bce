"""Every product as one batched matrix product, so that one search serves linear, convolution and attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vit_fx.names import Operand
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.quantizers import UniformParams

#: Elements that one step of a search computes, a part of the rows or several candidates. A CPU keeps them in its cache;
#: on a GPU small work takes no longer than the call.
CPU_ELEMENTS = 1 << 20
GPU_ELEMENTS = 1 << 25


def step_elements(device: torch.device) -> int:
    """Return how many elements one step of a search computes on this device."""
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS


@dataclass(frozen=True)
class Product:
    """out = lhs @ rhs + bias, with the weight of each output element in the distance.

    lhs: (batch, heads, rows, inner). rhs: (batch, heads, inner, columns); with shares_rhs it is a weight and the batch
    is 1. bias: (heads, 1, columns) or None.
    element_weight: (batch, heads, rows, columns or 1), or None for 1 everywhere. A linear layer has batch 1, heads 1
    and all tokens as rows; the heads of a convolution are its groups. weight_shape: the shape of a weight in the graph.
    """

    lhs: Tensor
    rhs: Tensor
    bias: Tensor | None = None
    element_weight: Tensor | None = None
    shares_rhs: bool = True
    weight_shape: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> Product:
        """Return the product on another device."""
        bias, weight = (None if x is None else x.to(device) for x in (self.bias, self.element_weight))
        return replace(self, lhs=self.lhs.to(device), rhs=self.rhs.to(device), bias=bias, element_weight=weight)

    def operand(self, operand: Operand) -> Tensor:
        """Return one of the operands."""
        return self.lhs if operand == "lhs" else self.rhs

    def output(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """Return lhs @ rhs + bias: (batch, heads, rows, columns)."""
        out = torch.matmul(lhs, rhs)
        return out if self.bias is None else out.add_(self.bias)

    def weighted_squares(self, error: Tensor) -> Tensor:
        """Square the error of the output, (batch, heads, rows, columns), in place, and weigh it."""
        squares = error.square_()
        return squares if self.element_weight is None else squares.mul_(self.element_weight)

    def chunks(self) -> Iterator[Product]:
        """Yield the product in parts of bounded output size, along the rows of a shared rhs, else along the batch."""
        batch, heads, rows, _ = self.lhs.shape
        row_elements = heads * self.rhs.shape[-1]
        elements = step_elements(self.lhs.device)
        if not self.shares_rhs:
            step = max(1, elements // (row_elements * rows))
            for start in range(0, batch, step):
                part = slice(start, start + step)
                yield self._part(part, slice(None))
        else:
            step = max(16, elements // row_elements)
            for start in range(0, rows, step):
                yield self._part(slice(None), slice(start, start + step))

    def _part(self, batch: slice, rows: slice) -> Product:
        return replace(
            self,
            lhs=self.lhs[batch, :, rows],
            rhs=self.rhs if self.shares_rhs else self.rhs[batch],
            element_weight=None if self.element_weight is None else self.element_weight[batch, :, rows],
        )


def to_product(
    op: QuantOp, lhs: Tensor, rhs: Tensor, bias: Tensor | None = None, weight: Tensor | None = None
) -> Product:
    """Return the product of captured operands; weight (the shape of the output) is each output's in the distance.

    linear: lhs (..., inner), rhs (columns, inner). conv2d: lhs (batch, channels, height, width), rhs (columns,
    inner/groups, kernel height, kernel width). matmul: lhs (..., rows, inner), rhs (..., inner, columns), expanded
    to the same leading dimensions, or rhs (inner, columns) if it is a weight.
    """
    if op.kind == "conv2d":
        return _conv_product(op, lhs, rhs, bias, weight)
    if op.kind == "linear" or op.rhs_is_weight:
        flat = None if weight is None else weight.reshape(1, 1, -1, weight.shape[-1])
        matrix = rhs.t() if op.kind == "linear" else rhs
        row = None if bias is None else bias.view(1, 1, -1)
        return Product(lhs.reshape(1, 1, -1, lhs.shape[-1]), matrix[None, None], row, flat, weight_shape=rhs.shape)
    heads = lhs.shape[-3] if lhs.ndim >= 4 else 1

    def split(x: Tensor) -> Tensor:
        return x.reshape(-1, heads, *x.shape[-2:])

    importance = None if weight is None else split(weight)
    return Product(split(lhs), split(rhs), element_weight=importance, shares_rhs=False)


def _conv_product(op: QuantOp, x: Tensor, kernel: Tensor, bias: Tensor | None, weight: Tensor | None) -> Product:
    size = kernel.shape[-2:]
    x = F.pad(x, _explicit_padding(op, size))
    patches = F.unfold(x, size, dilation=op.dilation, stride=op.stride)  # (batch, channels * kernel, positions)
    groups, columns = op.groups, kernel.shape[0] // op.groups

    def rows(t: Tensor) -> Tensor:  # (batch, groups * k, positions) -> (1, groups, batch * positions, k)
        batch, channels, positions = t.shape
        return t.reshape(batch, groups, channels // groups, positions).permute(1, 0, 3, 2).flatten(1, 2)[None]

    return Product(
        rows(patches),
        kernel.reshape(groups, columns, -1).transpose(1, 2)[None],
        None if bias is None else bias.view(groups, 1, columns),
        None if weight is None else rows(weight.flatten(2)),
        weight_shape=kernel.shape,
    )


def weight_in_graph(op: QuantOp, product: Product, weight: Tensor) -> Tensor:
    """Return a weight (1, heads, inner, columns) as the graph has it: what `to_product` made a product of."""
    assert product.weight_shape is not None
    flat = weight[0, 0] if op.kind == "matmul" else weight[0].mT
    return flat.reshape(product.weight_shape).contiguous()


def _explicit_padding(op: QuantOp, size: torch.Size) -> list[int]:
    """Return F.pad's (left, right, top, bottom) of a convolution's padding."""
    if op.padding == "valid":
        return [0, 0, 0, 0]
    if op.padding == "same":
        totals = [d * (k - 1) for d, k in zip(op.dilation, size, strict=True)]
        return [totals[1] // 2, totals[1] - totals[1] // 2, totals[0] // 2, totals[0] - totals[0] // 2]
    height, width = (int(p) for p in op.padding)
    return [width, width, height, height]


@dataclass(frozen=True)
class ScaleGroups:
    """How many scales an operand has: `heads` along the heads times `columns` along the columns of a product."""

    heads: int = 1
    columns: int = 1

    def reduce(self, sums: Tensor) -> Tensor:
        """Sum per-column statistics (..., heads, columns) to one value per scale."""
        return self._grouped(sums).sum((-3, -1))

    def absmax(self, operand: Tensor) -> Tensor:
        """Return the largest magnitude per scale of a (batch, heads, i, j) operand: (self.heads, self.columns)."""
        if self.columns == 1:
            return operand.abs().amax((0, 2, 3)).view(self.heads, -1).amax(1, keepdim=True)
        return self._grouped(operand.abs().amax((0, 2))).amax((-3, -1))

    def expand(self, values: Tensor, heads: int, columns: int) -> Tensor:
        """Return (..., self.heads, self.columns) values as (..., heads or 1, 1, columns or 1), to broadcast."""
        values = values.repeat_interleave(heads // self.heads, -2) if self.heads > 1 else values
        values = values.repeat_interleave(columns // self.columns, -1) if self.columns > 1 else values
        return values.unsqueeze(-2)

    def _grouped(self, x: Tensor) -> Tensor:
        heads, columns = x.shape[-2:]
        return x.reshape(*x.shape[:-2], self.heads, heads // self.heads, self.columns, columns // self.columns)


def scale_groups(granularity: str, groups: int, product: Product, op: QuantOp, *, is_weight: bool) -> ScaleGroups:
    """Return the scale groups of an operand with this granularity."""
    heads, columns = product.rhs.shape[1], product.rhs.shape[3]
    if granularity == "head":
        return ScaleGroups(heads, 1)
    if granularity == "channel" and is_weight:
        return ScaleGroups(heads if op.kind == "conv2d" else 1, columns)
    if granularity == "group" and is_weight:
        return ScaleGroups(1, groups)
    return ScaleGroups()


def site_params(
    op: QuantOp, groups: ScaleGroups, rhs_shape: torch.Size, scale: Tensor, *, is_weight: bool
) -> UniformParams:
    """Return scales (groups.heads, groups.columns) in the layout of the operand in the graph."""
    if groups == ScaleGroups():
        return UniformParams(scale.reshape(()).clone())
    _, heads, _, columns = rhs_shape
    if not is_weight:
        return UniformParams(scale.reshape(heads).clone(), axis=op.scale_axis("lhs"))
    full: Any = groups.expand(scale, heads, columns).expand(heads, 1, columns).reshape(-1)
    return UniformParams(full.clone(), axis=op.scale_axis("rhs"))
