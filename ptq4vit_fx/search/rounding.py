"""Rounding a weight by the Gram matrix of its inputs: the error of each input's row is made up for by the rows behind.

With H = X^T D X of the quantized inputs X, D the weights of their rows, the squared distance that errors d of a column
cause is d' H d. Rounding each value to its nearest code minimizes the diagonal of that alone. Here the rows of a weight
(inner, columns) are rounded one after the other, in falling order of H's diagonal, and what is still to be rounded
moves to the best place beside what is rounded already (GPTQ, Frantar et al. 2022). With H^-1 = U' U, U upper:

    q_i = quantize(w_i),  e = (w_i - q_i) / U_ii,  w_j -= U_ij e  for all j behind i

All columns at once; their scales are fixed before. A value that the grid clips hands on its error like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_fx.errors import warn
from ptq4vit_fx.quantizers import Uniform, UniformParams
from ptq4vit_fx.search.candidates import UniformCandidates
from ptq4vit_fx.search.landscape import Choice, Landscape

#: What is added to H's diagonal, as a share of its mean: directions that few images show count for more than they do
#: in these images.
DAMPING = 0.1
#: H with less of it may have no Cholesky factor in float32; so often it is tried with ten times as much.
MORE_DAMPING = 4
#: Rows that are rounded before what they hand on reaches the rows behind them, in one product.
BLOCK = 64
#: The largest code of a container of codes.
LARGEST_CODE = 127


def round_weight(landscape: Landscape, choice: Choice, name: str) -> tuple[Tensor, Tensor] | None:
    """Return the codes of a weight beside a choice, int8 (1, heads, inner, columns), and their values, float32.

    None, with a warning that names the product: H has no factor. None without one: codes that int8 does not hold.
    """
    searched, weight = landscape.candidates["rhs"], landscape.product.rhs
    assert isinstance(searched, UniformCandidates)
    if not searched.quantizer.signed and searched.quantizer.top > LARGEST_CODE:
        return None
    found = inverse_factor(gram(landscape, choice), DAMPING)
    if found is None:
        warn(f"calibrate: the inputs of {name} have no Gram matrix to round its weight by; it is rounded to nearest")
        return None
    order, factor, damping = found
    if damping > DAMPING:
        warn(f"calibrate: the weight of {name} is rounded with a damping of {damping:.3g} in place of {DAMPING}")
    params = searched.params_over(weight, choice["rhs"])
    codes = rounded(weight[0], order, factor, searched.quantizer, params)
    return codes[None], searched.quantizer.decode(codes, params)[None]


def gram(landscape: Landscape, choice: Choice) -> Tensor:
    """Return H = X^T D X, float32 (heads, inner, inner), of the lhs as it is chosen, over all rows.

    D is the weight of a row in the distance, the mean over its outputs where these have weights of their own.
    """
    _, heads, inner, _ = landscape.product.rhs.shape
    square = landscape.product.rhs.new_zeros(heads, inner, inner)
    for (part, _), x in zip(landscape.parts, landscape.quantized("lhs", choice["lhs"]), strict=True):
        weight = part.element_weight
        weighted = x if weight is None else x * weight.mean(-1, keepdim=True)
        square += (weighted.mT @ x)[0]
    return square


def inverse_factor(square: Tensor, damping: float) -> tuple[Tensor, Tensor, float] | None:
    """Return the order of rounding, U in that order, and the damping that it took; None if H has no factor.

    square: H, float32 (heads, inner, inner). The order is (heads, inner); U is (heads, inner, inner), upper triangular,
    with (H + damping)^-1 = U' U but for a factor that plays no part. Inputs that are always zero are decoupled.
    """
    diagonal = square.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    dead = diagonal <= 0
    mean = diagonal.clamp_min(0).sum(1) / (~dead).sum(1).clamp_min(1)
    mean = torch.where(mean > 0, mean, 1.0)[:, None]
    # Backwards: with H reversed = L L', (H)^-1 = U' U where U is L^-1 reversed, and L^-1 is one triangular solve.
    backwards = order.flip(1)
    damped = _permuted(square, backwards) / mean[..., None]
    off = dead.gather(1, backwards)
    damped.masked_fill_(off[:, :, None] | off[:, None, :], 0.0)
    damped.diagonal(dim1=1, dim2=2).add_(off.float() + damping)
    for _ in range(1 + MORE_DAMPING):
        lower, info = torch.linalg.cholesky_ex(damped)
        failed = (info != 0) | ~lower.isfinite().all(2).all(1)
        if not bool(failed.any()):
            del damped
            eye = torch.eye(square.shape[1], device=square.device).expand_as(square)
            return order, torch.linalg.solve_triangular(lower, eye, upper=False).flip(1, 2), damping
        damped.diagonal(dim1=1, dim2=2).add_(9 * damping * failed[:, None])
        damping *= 10
    return None


def rounded(weight: Tensor, order: Tensor, factor: Tensor, quantizer: Uniform, params: UniformParams) -> Tensor:
    """Return the codes of a weight, int8 (heads, inner, columns), rounded in this order.

    weight: float32 (heads, inner, columns). order, factor: of `inverse_factor`. params: a scale that broadcasts.
    """
    heads, inner, columns = weight.shape
    places = order[:, :, None].expand_as(weight)
    left = weight.gather(1, places)
    for start in range(0, inner, BLOCK):
        stop = min(start + BLOCK, inner)
        errors = left.new_zeros(heads, stop - start, columns)
        for i in range(start, stop):
            above, here = factor[:, start:i, i : i + 1], i - start
            row = torch.baddbmm(left[:, i : i + 1], above.mT, errors[:, :here], alpha=-1)
            left[:, i : i + 1] = quantizer.fake_quantize(row, params)
            errors[:, here : here + 1] = (row - left[:, i : i + 1]) / factor[:, i : i + 1, i : i + 1]
        left[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, errors, alpha=-1)
    quantized = torch.empty_like(left).scatter_(1, places, left)
    return quantizer.codes(quantized, params).to(torch.int8)


def _permuted(square: Tensor, order: Tensor) -> Tensor:
    rows = square.gather(1, order[:, :, None].expand_as(square))
    return rows.gather(2, order[:, None, :].expand_as(square))
