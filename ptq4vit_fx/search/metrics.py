"""Distances between a product's float output and its quantized output: values, one sign, lower is better.

Every metric is a sum of element-wise statistics followed by a small closing formula. Sums can be taken over
sampled rows (with importance weights), over chunks, and per group of channels, without the metric knowing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A distance.

    statistics(target, estimate) returns element-wise tensors, of the shape of either, and may overwrite the estimate;
    the search multiplies each by the element weight and sums them; finish(sums) turns the sums, shape
    (statistics, ...), into distances.
    weighted_by_gradient: multiply by (dL/dout)^2, the diagonal Fisher approximation of the Hessian
    (PTQ4ViT, section 3.3, equation 7). degree: outputs c times as large are c^degree times as far apart.
    """

    name: str
    statistics: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    finish: Callable[[Tensor], Tensor]
    weighted_by_gradient: bool = False
    degree: int = 0

    @property
    def is_squared_error(self) -> bool:
        """Whether the distance is a (weighted) sum of squared errors, that is a quadratic form of either operand."""
        return self.statistics is _squared


def _squared(target: Tensor, estimate: Tensor) -> tuple[Tensor, ...]:
    return (estimate.sub_(target).square_(),)


def _absolute(target: Tensor, estimate: Tensor) -> tuple[Tensor, ...]:
    return (estimate.sub_(target).abs_(),)


def _products(target: Tensor, estimate: Tensor) -> tuple[Tensor, ...]:
    return target * estimate, target * target, estimate * estimate


def _moments(target: Tensor, estimate: Tensor) -> tuple[Tensor, ...]:
    return (*_products(target, estimate), target, estimate, torch.ones_like(target))


def _first(sums: Tensor) -> Tensor:
    return sums[0]


def _cosine(sums: Tensor) -> Tensor:
    cross, target, estimate = sums
    return 1 - _correlation(cross, target, estimate)


def _pearson(sums: Tensor) -> Tensor:
    cross, target, estimate, target_sum, estimate_sum, count = sums
    return 1 - _correlation(
        cross - target_sum * estimate_sum / count,
        target - target_sum**2 / count,
        estimate - estimate_sum**2 / count,
    )


def _correlation(cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return cross / sqrt(first * second); 0 where one of the two is zero (nothing is left of the signal)."""
    norm = (first.clamp_min(0) * second.clamp_min(0)).sqrt()
    return torch.where(norm > 0, cross / norm.clamp_min(1e-300), torch.zeros_like(cross))


HESSIAN = Metric("hessian", _squared, _first, weighted_by_gradient=True, degree=2)
MSE = Metric("mse", _squared, _first, degree=2)
L1 = Metric("l1", _absolute, _first, degree=1)
COSINE = Metric("cosine", _products, _cosine)
PEARSON = Metric("pearson", _moments, _pearson)

_BY_NAME = {metric.name: metric for metric in (HESSIAN, MSE, L1, COSINE, PEARSON)}


def get_metric(name: str) -> Metric:
    """Return the metric called `name`, one of `qconfig.METRICS`."""
    return _BY_NAME[name]
