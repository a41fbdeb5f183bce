"""Rounding a weight by the Gram matrix of its inputs: the error of each input's row is made up for by the rows behind.

With H = X^T D X of the quantized inputs X, D a weight of each row, and x the float inputs, the squared distance that
errors d of a column w cause is, but for a constant,

    d' H d + 2 d' L,  L = X^T D (X - x) w

Rounding each value to its nearest code minimizes the diagonal of that alone. Here it is d'(H + damping)d + 2 d'L: its
least is at w - (H + damping)^-1 L, which makes up for what the inputs have lost. Around that place the rows of a weight
(inner, columns) are rounded one after the other, in falling order of H's diagonal; what is yet to be rounded moves to
the best place beside what is rounded already (GPTQ, Frantar et al. 2022). With U upper and (H + damping)^-1 = U' U:

    q_i = quantize(w_i),  e = (w_i - q_i) / U_ii,  w_j -= U_ij e  for all j behind i

All columns at once; their scales are fixed before. A value that the grid clips hands on its error like any other.

What is rounded first has not seen how the rows behind it were rounded. On a coarse grid each value is then looked at
again beside all the others, and takes the code of which the distance is least (coordinate descent).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_fx.errors import warn
from ptq4vit_fx.quantizers import Quantizer, Uniform, UniformParams
from ptq4vit_fx.search.candidates import UniformCandidates
from ptq4vit_fx.search.gram import DAMPING, damped, inverse_factor, root_weighted
from ptq4vit_fx.search.landscape import Choice, Landscape

#: Rows that are rounded before what they hand on reaches the rows behind them, in one product.
BLOCK = 64
#: So often the values of a grid of fewer than so many bits are looked at again. It takes 4 % of the distance at any
#: width, and of the divergence of a whole model 3 to 5 % at 4 bits; at 6 and at 8 none that 800 images show.
SWEEPS, COARSE_BITS = 2, 6
#: The largest code of a container of codes.
LARGEST_CODE = 127


def fits(quantizer: Quantizer) -> bool:
    """Return whether int8 holds the codes of a quantizer."""
    return isinstance(quantizer, Uniform) and (quantizer.signed or quantizer.top <= LARGEST_CODE)


def round_weight(landscape: Landscape, choice: Choice, name: str) -> tuple[Tensor, Tensor] | None:
    """Return the codes of a weight beside a choice, int8 (1, heads, inner, columns), and their values, float32.

    None, with a warning that names the product: H has no factor.
    """
    searched, weight = landscape.candidates["rhs"], landscape.product.rhs
    assert isinstance(searched, UniformCandidates)
    square, linear = distance_terms(landscape, choice)
    found = inverse_factor(square, DAMPING)
    if found is None:
        warn(f"calibrate: the inputs of {name} have no Gram matrix to round its weight by; it is rounded to nearest")
        return None
    order, factor, damping = found
    if damping > DAMPING:
        warn(f"calibrate: the weight of {name} is rounded with a damping of {damping:.3g} in place of {DAMPING}")
    params = searched.params_over(weight, choice["rhs"])
    aim = least(weight[0], linear, order, factor)
    codes = rounded(aim, order, factor, searched.quantizer, params)
    if searched.quantizer.bits < COARSE_BITS:
        damped_square = damped(square, damping)
        for _ in range(SWEEPS):
            codes = descended(codes, aim, damped_square, searched.quantizer, params)
    return codes[None], searched.quantizer.decode(codes, params)[None]


def distance_terms(landscape: Landscape, choice: Choice) -> tuple[Tensor, Tensor]:
    """Return H and L over all rows beside the lhs as it is chosen, float32 (heads, inner, inner) and (.., columns).

    D: see `root_weighted`.
    """
    _, heads, inner, columns = landscape.product.rhs.shape
    square = landscape.product.rhs.new_zeros(heads, inner, inner)
    linear = landscape.product.rhs.new_zeros(heads, inner, columns)
    for (part, target), x in zip(landscape.parts, landscape.quantized("lhs", choice["lhs"]), strict=True):
        weighted = root_weighted(part, x)
        square += (weighted.mT @ x)[0]
        linear += (weighted.mT @ part.output(x, part.rhs).sub_(target))[0]
    return square, linear


def least(weight: Tensor, linear: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Return w - (H + damping)^-1 L, float32 (heads, inner, columns): where the distance is least without a grid."""
    places = order[:, :, None].expand_as(weight)
    shift = factor.mT @ (factor @ linear.gather(1, places))
    return weight - torch.empty_like(weight).scatter_(1, places, shift)


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


def descended(codes: Tensor, aim: Tensor, square: Tensor, quantizer: Uniform, params: UniformParams) -> Tensor:
    """Return codes, int8 (heads, inner, columns), each in turn the best beside all others: a sweep from row to row.

    aim: where d' square d is least, d the distance from it, float32 as the codes. square: H + damping, (heads, inner,
    inner). That sum never grows, but for float32's rounding: value i is best at its own less (square d)_i / square_ii.
    """
    values = quantizer.decode(codes, params)
    slopes, own = square @ (values - aim), square.diagonal(dim1=1, dim2=2)[..., None]
    inner = values.shape[1]
    for start in range(0, inner, BLOCK):
        stop = min(start + BLOCK, inner)
        steps = torch.zeros_like(values[:, start:stop])
        for i in range(start, stop):
            here = i - start
            slope = torch.baddbmm(slopes[:, i : i + 1], square[:, i : i + 1, start:i], steps[:, :here])
            value = quantizer.fake_quantize(values[:, i : i + 1] - slope / own[:, i : i + 1], params)
            steps[:, here : here + 1] = value - values[:, i : i + 1]
            values[:, i : i + 1] = value
        slopes[:, stop:].baddbmm_(square[:, stop:, start:stop], steps)
    return quantizer.codes(values, params).to(torch.int8)
