"""The Gram matrix of a product's inputs, by which errors of its weight make up for each other, and its factor."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_fx.search.products import Product

#: What is added to H's diagonal, as a share of its mean: a direction that these images hardly show is not free. Less of
#: it fits them better and others worse (deit_tiny, W4A4: 0.1 and 0.5 and 2 give a KL of 0.121, 0.113 and 0.115).
DAMPING = 0.5
#: H with less of it may have no Cholesky factor in float32; so often it is tried with ten times as much.
MORE_DAMPING = 4


def root_weighted(part: Product, x: Tensor) -> Tensor:
    """Return inputs x of a part of a product, each row times the root of its weight in the distance.

    Of the mean weight over its outputs, where these have weights of their own. The root, because a few rows hold most
    of the gradient, and what only they ask for is not what other images ask for.
    """
    weight = part.element_weight
    return x if weight is None else x * weight.mean(-1, keepdim=True).sqrt_()


def inverse_factor(square: Tensor, damping: float) -> tuple[Tensor, Tensor, float] | None:
    """Return the order of rounding, U in that order, and the damping that it took; None if H has no factor.

    square: H, float32 (heads, inner, inner). The order is (heads, inner); U is (heads, inner, inner), upper triangular,
    with (H + damping)^-1 = U' U. Inputs that are always zero are decoupled. damping: a share of H's mean diagonal.
    """
    found = _factor(square, damping)
    if found is None:
        return None
    order, lower, mean, damping = found
    # H reversed is L L', so (H)^-1 = U' U where U is L^-1 reversed, and L^-1 is one triangular solve.
    eye = torch.eye(square.shape[1], device=square.device).expand_as(square)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False).flip(1, 2)
    return order, inverse.mul_(mean.rsqrt()[..., None]), damping


def left_over(square: Tensor) -> Tensor:
    """Return what an error of each row of a weight costs that the rows behind it make up for: float32 (heads, inner).

    With U of `inverse_factor`, rounding leaves the sum of ((w_i - q_i) / U_ii)^2 of a column's squared distance: 1 /
    U_ii^2 is what is left of H_ii. Of an H without a factor nothing is made up for, and it is H_ii.
    """
    found = _factor(square, DAMPING)
    if found is None:
        return square.diagonal(dim1=1, dim2=2)
    order, lower, mean, _ = found
    left = lower.diagonal(dim1=1, dim2=2).flip(1).square() * mean  # U_ii is 1 / L_ii
    return torch.empty_like(left).scatter_(1, order, left)


def damped(square: Tensor, damping: float) -> Tensor:
    """Return H with `damping` times its mean diagonal added to its diagonal: float32 (heads, inner, inner)."""
    found = square.clone()
    found.diagonal(dim1=1, dim2=2).add_(damping * mean_diagonal(square))
    return found


def mean_diagonal(square: Tensor) -> Tensor:
    """Return the mean of H's diagonal over the inputs that are not always zero, (heads, 1), and 1 where all are."""
    diagonal = square.diagonal(dim1=1, dim2=2).clamp_min(0)
    mean = diagonal.sum(1) / (diagonal > 0).sum(1).clamp_min(1)
    return torch.where(mean > 0, mean, 1.0)[:, None]


def _factor(square: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Return the order of rounding, the Cholesky factor L of H / mean in reversed order, the mean, and the damping."""
    diagonal = square.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    dead, mean = diagonal <= 0, mean_diagonal(square)
    backwards = order.flip(1)
    shares = _permuted(square, backwards) / mean[..., None]
    off = dead.gather(1, backwards)
    shares.masked_fill_(off[:, :, None] | off[:, None, :], 0.0)
    shares.diagonal(dim1=1, dim2=2).add_(damping)
    for _ in range(1 + MORE_DAMPING):
        lower, info = torch.linalg.cholesky_ex(shares)
        failed = (info != 0) | ~lower.isfinite().all(2).all(1)
        if not bool(failed.any()):
            return order, lower, mean, damping
        shares.diagonal(dim1=1, dim2=2).add_(9 * damping * failed[:, None])
        damping *= 10
    return None


def _permuted(square: Tensor, order: Tensor) -> Tensor:
    rows = square.gather(1, order[:, :, None].expand_as(square))
    return rows.gather(2, order[:, None, :].expand_as(square))
