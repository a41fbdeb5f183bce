"""Few rows that stand for all: drawn by how much of the distance lies on them.

In a vision transformer the gradient of the loss, and with it the distance, lies on few rows: those of the class tokens
hold 90 % and more in most layers of a DeiT. Rows that matter are therefore always in the sample, with their own weight.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ptq4vit_fx.search.products import Product

#: The heaviest rows that hold this share of the distance belong to a sample, and as much as a quarter of the others.
ROW_SHARE = 0.97
#: Images that hold this share are sampled from; it is larger, because what an image lacks no other image makes up for.
IMAGE_SHARE = 0.99
MINIMUM_IMAGES = 8
#: Of more images than these (the windows of a windowed model), only so many that each gives a few rows: what a product
#: of two activations costs is mostly the quantizing of rhs, which is done whole for each image.
MANY_IMAGES, ROWS_EACH = 32, 4


def sample_size(mass: Tensor, rows: int) -> int:
    """Return how many rows per head to draw: about `rows`, down to a quarter or up to the double as the mass demands.

    mass: (batch, heads, rows), how much of the distance lies on each row.
    """
    needed = _count_for_share(mass.transpose(0, 1).flatten(1), ROW_SHARE)
    return min(max(needed + needed // 4, rows // 4), 2 * rows)


def sample_rows(product: Product, mass: Tensor, rows: int, generator: torch.Generator) -> Product:
    """Return about `rows` rows per head, drawn by their mass, reweighted so that sums over them stay unbiased.

    A row that is drawn with probability p counts 1 / p. A product that has no more rows is returned as it is. A product
    of two activations is sampled in two steps, images and then rows of each. Draws are made on the CPU, so that every
    device samples the same rows.
    """
    batch, _, length, _ = product.lhs.shape
    if batch * length <= rows:
        return product
    if batch > 1:
        by_image = mass.sum((1, 2))[None]
        images = max(min(batch, MINIMUM_IMAGES), _count_for_share(by_image, IMAGE_SHARE))
        images = min(images, max(MANY_IMAGES, rows // ROWS_EACH))
        if images < batch:
            chosen, factor = _draw(by_image, images, generator)
            product, mass = _take_batch(product, chosen[0], factor.view(-1, 1, 1, 1)), mass[chosen[0]]
        rows = max(1, rows // images)
        if length <= rows:
            return product
    chosen, factor = _draw(mass.flatten(0, 1), rows, generator)
    shape = (*product.lhs.shape[:2], rows)
    return _take_rows(product, chosen.view(shape), factor.view(*shape, 1))


def _count_for_share(mass: Tensor, share: float) -> int:
    """Return how many of the largest columns of a line hold this share of it, the most over the lines."""
    largest = mass.double().sort(dim=1, descending=True)[0].cumsum(1)
    return int((largest < share * largest[:, -1:]).sum(1).amax()) + 1


def _draw(mass: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` different columns of each line of mass (lines, columns); return indices and importance factors.

    Systematic sampling (Madow 1949) with inclusion probabilities proportional to the mass: what has more mass than one
    draw is worth is always in. A tenth of the probability is spread evenly, so that no row with little mass
    gets an enormous factor.
    """
    mass = mass.double().cpu()
    even = torch.full_like(mass, 1.0 / mass.shape[1])
    total = mass.sum(1, keepdim=True)
    share = torch.where(total > 0, 0.9 * mass / total.clamp_min(1e-300) + 0.1 * even, even)
    inclusion = (count * share).clamp_max(1.0)
    while True:  # what exceeds 1 goes to the other columns, until none exceeds it
        certain = inclusion >= 1.0
        rest = share.masked_fill(certain, 0.0)
        left = count - certain.sum(1, keepdim=True)
        raised = (rest * left / rest.sum(1, keepdim=True).clamp_min(1e-300)).masked_fill(certain, 1.0)
        inclusion = raised.clamp_max(1.0)
        if not bool((raised > 1.0).any()):
            break
    bounds = inclusion.cumsum(1)
    start = torch.rand(len(mass), 1, dtype=torch.float64, generator=generator)
    points = (start + torch.arange(count)) * (bounds[:, -1:] / count)
    chosen = torch.searchsorted(bounds, points, right=True).clamp_max(mass.shape[1] - 1)
    return chosen, (1.0 / inclusion.gather(1, chosen)).float()


def _take_batch(product: Product, chosen: Tensor, factor: Tensor) -> Product:
    chosen, factor = chosen.to(product.lhs.device), factor.to(product.lhs.device)
    weight = product.element_weight
    return replace(
        product,
        lhs=product.lhs[chosen],
        rhs=product.rhs if product.shares_rhs else product.rhs[chosen],
        element_weight=factor.expand(-1, *product.lhs.shape[1:3], 1) if weight is None else weight[chosen] * factor,
    )


def _take_rows(product: Product, chosen: Tensor, factor: Tensor) -> Product:
    index, factor = chosen[..., None].to(product.lhs.device), factor.to(product.lhs.device)
    weight = product.element_weight
    if weight is not None:
        factor = weight.gather(2, index.expand(*index.shape[:3], weight.shape[-1])) * factor
    lhs = product.lhs.gather(2, index.expand(*index.shape[:3], product.lhs.shape[-1]))
    return replace(product, lhs=lhs, element_weight=factor)
