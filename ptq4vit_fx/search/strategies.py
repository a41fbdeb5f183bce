"""How one operand is searched beside the other: every candidate on all rows, or the promising ones on few."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ptq4vit_fx.inputs.settings import SearchSettings
from ptq4vit_fx.names import OPERANDS, Operand
from ptq4vit_fx.search.distances import OutputEvaluation, make_evaluation
from ptq4vit_fx.search.landscape import OTHER, Choice, Landscape
from ptq4vit_fx.search.sampling import sample_size
from ptq4vit_fx.search.screening import best_of, evaluate_all, leaders, screen

#: PTQ4ViT, Algorithm 1: the weight (or right operand) first.
SEARCH_ORDER: tuple[Operand, Operand] = ("rhs", "lhs")
#: A sample of this part of the screening sample says which candidates of an attention product are promising.
TINY_PART = 16
TINY_MINIMUM = 16
#: So many leading candidates of each operand are paired at the end of the screening of two activations.
PAIRED = 6


class Strategy(Protocol):
    """A way to search the operands of one product."""

    def best(self, operand: Operand, choice: Choice) -> Tensor:
        """Return the best candidates of an operand, (heads, columns), while the other one keeps its choice."""
        ...

    def decide(self, choice: Choice) -> Choice:
        """Return the choice on all rows, after the alternation has ended at `choice`."""
        ...

    def anew(self) -> Strategy:
        """Return the strategy for another start: what was found out beside other choices is forgotten."""
        ...


@dataclass(frozen=True)
class Exhaustive:
    """Every candidate on all rows."""

    landscape: Landscape

    def best(self, operand: Operand, choice: Choice) -> Tensor:
        return best_of(evaluate_all(make_evaluation(self.landscape, operand, choice)))

    def decide(self, choice: Choice) -> Choice:
        return choice

    def anew(self) -> Exhaustive:
        return self


@dataclass(frozen=True)
class _Found:
    """What screening an operand gave: its table, what to expect of all candidates, and the choice it stood beside."""

    table: Tensor
    expected: Tensor
    beside: Tensor


@dataclass(frozen=True)
class Screened:
    """Promising candidates, the best few of which are decided on all rows.

    sample: the rows that screen candidates. tiny: for two activations, the rows that say which are promising, because
    the distance of an attention product hangs on a few rows and has narrow minima, which a coarse grid would miss.
    confirm: how many candidates are decided on all rows. found: what has been found out so far.
    """

    everything: Landscape
    sample: Landscape
    tiny: Landscape | None
    confirm: int
    found: dict[Operand, _Found] = field(default_factory=dict)

    @staticmethod
    def of(landscape: Landscape, settings: SearchSettings, seed: int) -> Screened:
        """Draw the samples."""
        assert settings.screen_rows is not None
        generator = torch.Generator().manual_seed(seed)
        mass = landscape.row_mass()
        size = sample_size(mass, settings.screen_rows)
        sample, tiny = landscape.sample(mass, size, generator), None
        if sample is not landscape and not landscape.product.shares_rhs:
            tiny = landscape.sample(mass, max(TINY_MINIMUM, size // TINY_PART), generator)
        return Screened(landscape, sample, tiny, settings.confirm)

    def anew(self) -> Screened:
        return replace(self, found={})

    def screened_on(self, operand: Operand) -> Landscape:
        """Return the rows that screen an operand: for a weight all, where the closed form is cheaper on these."""
        if self.everything.searched_alone(operand):
            return self.everything
        rows, inner = self.sample.product.lhs.shape[2:]
        in_closed_form = operand == "rhs" and self.everything.has_row_weights and inner < rows
        return self.everything if in_closed_form else self.sample

    def best(self, operand: Operand, choice: Choice) -> Tensor:
        last, beside = self.found.get(operand), choice[OTHER[operand]]
        if last is not None and self._still_holds(operand, choice):
            return choice[operand]
        prior = self._first_guess(operand, choice) if last is None else last.expected
        table, expected = screen(make_evaluation(self.screened_on(operand), operand, choice), prior)
        self.found[operand] = _Found(table, expected, beside)
        return best_of(table)

    def _still_holds(self, operand: Operand, choice: Choice) -> bool:
        """Return whether the other operand is as it was when this one was screened, or does not matter to it."""
        beside = self.found[operand].beside
        return self.everything.searched_alone(operand) or torch.equal(beside, choice[OTHER[operand]])

    def decide(self, choice: Choice) -> Choice:
        if self.sample is self.everything:
            return choice
        candidates = self.everything.candidates
        if self.tiny is not None and candidates["lhs"].groups == candidates["rhs"].groups:
            return self._decide_pairs()
        for operand in SEARCH_ORDER:
            if self.screened_on(operand) is self.sample:
                few = leaders(self.found[operand].table, self.confirm)
                best = make_evaluation(self.everything, operand, choice)(few).argmin(0)
                choice = choice | {operand: few.gather(0, best[None])[0]}
        if self.screened_on("rhs") is self.everything and not self._still_holds("rhs", choice):
            evaluation = make_evaluation(self.everything, "rhs", choice)
            choice = choice | {"rhs": best_of(screen(evaluation, self.found["rhs"].expected)[0])}
        return choice

    def _first_guess(self, operand: Operand, choice: Choice) -> Tensor | None:
        if self.tiny is None or not self.tiny.candidates[operand].ordered:
            return None
        return evaluate_all(make_evaluation(self.tiny, operand, choice))

    def _decide_pairs(self) -> Choice:
        """Pair the leading candidates of two activations on the sample, and decide the best few pairs on all rows.

        Alternating searches of two operands end where neither can improve alone; pairs find the better places nearby.
        """

        def distances(landscape: Landscape, left: Tensor, rights: Tensor) -> Tensor:
            return OutputEvaluation(landscape, "rhs", {"lhs": left})(rights)

        lefts, rights = (leaders(self.found[operand].table, PAIRED) for operand in OPERANDS)
        best = leaders(torch.cat([distances(self.sample, left, rights) for left in lefts]), self.confirm)
        left = lefts.repeat_interleave(len(rights), 0).gather(0, best)
        right = rights.repeat(len(lefts), 1, 1).gather(0, best)
        exact = torch.cat([distances(self.everything, a, b[None]) for a, b in zip(left, right, strict=True)])
        first = exact.argmin(0)[None]
        return {"lhs": left.gather(0, first)[0], "rhs": right.gather(0, first)[0]}
