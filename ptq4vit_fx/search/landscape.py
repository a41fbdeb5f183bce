"""The landscape of one product: its distance from the float output, as a function of what its operands choose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ptq4vit_fx.names import OPERANDS, Operand
from ptq4vit_fx.search.candidates import Candidates, uniform_choice
from ptq4vit_fx.search.metrics import Metric
from ptq4vit_fx.search.products import Product
from ptq4vit_fx.search.sampling import sample_rows

#: The chosen candidate of each scale, (heads, columns) per operand.
Choice = dict[Operand, Tensor]

#: The distance of a product, and signal-to-noise ratios in dB of its operands and its output.
Total = tuple[float, dict[str, float]]

#: The operand that keeps its choice while one is searched.
OTHER: dict[Operand, Operand] = {"lhs": "rhs", "rhs": "lhs"}

#: Shares of the candidates at which `row_mass` looks: a scale that clips a lot, and one near where most searches end.
PILOTS = (0.5, 0.8)


#: A column of a weight that is so long is rounded better than the luckiest nearest codes of all candidates are. Behind
#: 12 inputs (patches of 2 x 2 pixels) these had half the distance, behind 48 a tenth less.
LONG_COLUMN = 64


@dataclass(frozen=True, eq=False)
class Landscape:
    """A product on all or some of its rows, the metric, and the candidates of both operands.

    rounded: whether the rhs is a weight that will be rounded by the Gram matrix of its inputs. parts: the chunks of the
    product with their float outputs, computed once.
    """

    product: Product
    metric: Metric
    candidates: dict[Operand, Candidates]
    rounded: bool = False
    parts: tuple[tuple[Product, Tensor], ...] = field(init=False)

    def __post_init__(self) -> None:
        parts = tuple((part, part.output(part.lhs, part.rhs)) for part in self.product.chunks())
        object.__setattr__(self, "parts", parts)

    @property
    def has_row_weights(self) -> bool:
        """Whether the distance is a quadratic form of a shared weight: squared errors, one weight per row."""
        weight = self.product.element_weight
        one_weight_per_row = weight is None or weight.shape[-1] == 1
        return self.metric.is_squared_error and one_weight_per_row and self.product.shares_rhs

    def searched_alone(self, operand: Operand) -> bool:
        """Whether it does not matter to an operand what the other one has chosen: see `RoundingEvaluation`."""
        is_long = self.product.rhs.shape[2] >= LONG_COLUMN
        return operand == "rhs" and self.rounded and self.has_row_weights and is_long

    def start(self) -> Choice:
        """Return the choice of the initial scales."""
        return {operand: uniform_choice(searched, searched.count) for operand, searched in self.candidates.items()}

    def sample(self, mass: Tensor, rows: int, generator: torch.Generator) -> Landscape:
        """Return the landscape on about `rows` rows drawn by their mass, or this one if it has no more."""
        few = sample_rows(self.product, mass, rows, generator)
        return self if few is self.product else replace(self, product=few)

    def quantized(self, operand: Operand, indices: Tensor) -> Iterator[Tensor]:
        """Yield the quantized operand of each part; a weight that all parts share is quantized once."""
        quantized: Tensor | None = None
        for part, _ in self.parts:
            if quantized is None or operand == "lhs" or not part.shares_rhs:
                quantized = self.candidates[operand].fake_quantize(part.operand(operand), indices)
            yield quantized

    def total(self, choice: Choice, weight: Tensor | None = None) -> Total:
        """Return the distance of the whole product, all scales together, and signal-to-noise ratios in dB.

        weight: the quantized rhs in place of the one that is chosen.
        """
        sums: Tensor | None = None
        energies = {name: [0.0, 0.0] for name in (*OPERANDS, "out")}
        operands = [self.quantized(operand, choice[operand]) for operand in OPERANDS]
        operands[1] = operands[1] if weight is None else iter([weight] * len(self.parts))
        for (part, target), lhs, rhs in zip(self.parts, *operands, strict=True):
            estimate = part.output(lhs, rhs)
            for name, exact, quantized in (("lhs", part.lhs, lhs), ("rhs", part.rhs, rhs), ("out", target, estimate)):
                energies[name][0] += float(torch.linalg.vector_norm(exact)) ** 2
                energies[name][1] += float(torch.linalg.vector_norm(quantized - exact)) ** 2
            terms = self._sums(part, target, estimate)
            sums = terms if sums is None else sums + terms
        assert sums is not None
        return float(self.metric.finish(sums)), {name: _decibel(*energy) for name, energy in energies.items()}

    def zero_distance(self) -> float:
        """Return the distance of an output of zeros: what a distance is compared with to see how much is lost."""
        sums: Tensor | None = None
        for part, target in self.parts:
            terms = self._sums(part, target, torch.zeros_like(target))
            sums = terms if sums is None else sums + terms
        assert sums is not None
        return float(self.metric.finish(sums))

    def _sums(self, part: Product, target: Tensor, estimate: Tensor) -> Tensor:
        """Return the metric's sums over all scales, float64 (statistics,); the estimate is overwritten."""
        weight, statistics = part.element_weight, self.metric.statistics(target, estimate)
        return torch.stack([(s if weight is None else s * weight).sum(dtype=torch.float64) for s in statistics])

    def row_mass(self) -> Tensor:
        """Return how much of the squared distance lies on each row, (batch, heads, rows), summed over pilot candidates.

        A pilot quantizes one operand and leaves the other as it is; all pilots count alike. A weight that is evaluated
        on all rows needs none.
        """
        total: Tensor | None = None
        for operand, searched in self.candidates.items():
            if operand == "rhs" and self.has_row_weights:
                continue
            for share in PILOTS:
                mass = self._pilot_mass(operand, min(int(share * searched.count), searched.count - 1))
                total = mass if total is None else total + mass
        assert total is not None
        return total

    def _pilot_mass(self, operand: Operand, number: int) -> Tensor:
        rows = []
        pilot = self.quantized(operand, uniform_choice(self.candidates[operand], number))
        for (part, target), x in zip(self.parts, pilot, strict=True):
            error = part.output(x, part.rhs) if operand == "lhs" else part.output(part.lhs, x)
            rows.append(part.weighted_squares(error.sub_(target)).sum(-1))
        mass = torch.cat(rows, 2 if self.product.shares_rhs else 0)
        return mass / mass.sum((0, 2), keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf
