"""What a plan must keep: so much agreement, a divergence, its own or beside another plan, or a loss of top-1."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ptq4vit_fx.errors import PTQError, failure, warn
from ptq4vit_fx.tuning.frontier import Point

#: Where much is lost already, a tenth more is what one may add: at 4 bits no figure tells it.
ADDED_SHARE = 0.1


@dataclass(frozen=True)
class Budget:
    """What is asked for; one of the five is not None, and `kl` beside `kl_added` once that is known.

    agreement: the share of the same classes as float, or what `AgainstFloat.score` takes in its place. kl: mean
    divergence. top1_drop: of top-1 against float, in shares. limit: what may be taken; then the best within it is.
    kl_added: the divergence, as so much more than that of every product in the first form.
    """

    agreement: float | None = None
    kl: float | None = None
    top1_drop: float | None = None
    limit: float | None = None
    kl_added: float | None = None

    def beside(self, first: Point) -> Budget:
        """Return this where `first` is the plan of the first form: what may be added becomes a divergence."""
        if self.kl_added is None:
            return self
        return replace(self, kl=first.divergence + max(self.kl_added, ADDED_SHARE * first.divergence))

    def holds(self, point: Point) -> bool:
        """Return whether a measured plan keeps what is asked for."""
        if self.agreement is not None:
            return point.score >= self.agreement - 1e-12
        if self.kl is not None:
            return point.divergence <= self.kl
        if self.top1_drop is not None:
            assert point.drop is not None
            return point.drop <= self.top1_drop + 1e-12
        return True

    def __str__(self) -> str:
        if self.agreement is not None:
            return f"agreement of {self.agreement:.2%} with float"
        if self.kl_added is not None:
            return f"KL of at most {self.kl_added:g}, or a tenth, above that of the first form alone"
        if self.kl is not None:
            return f"KL of {self.kl:g}"
        if self.top1_drop is not None:
            return f"top-1 at most {100 * self.top1_drop:g} points below float"
        return f"limit of {self.limit:g}"

    def facts(self) -> dict[str, Any]:
        """Return what is asked for, JSON-ready."""
        return {name: value for name, value in vars(self).items() if value is not None}


def budget_of(
    agreement: float | None,
    kl: float | None,
    top1_drop: float | None,
    limit: float | None,
    kl_added: float | None,
    labels: Tensor | None,
) -> Budget:
    """Return the budget; raises PTQError unless exactly one is given, which float itself can meet."""
    given = {"agreement": agreement, "kl": kl, "top1_drop": top1_drop, "limit": limit, "kl_added": kl_added}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) != 1:
        got, do = " and ".join(asked) or "none", "pass agreement=0.99"
        raise failure("tune", "budget", expected=f"one of {', '.join(given)}", got=got, do=do)
    if agreement is not None and not 0 < agreement <= 1:
        raise _unmeetable("agreement", "above 0 and at most 1, which float itself has", agreement)
    if kl is not None and not 0 < kl < math.inf:
        raise _unmeetable("kl", "above 0, which float itself has", kl)
    if kl_added is not None and not 0 <= kl_added < math.inf:
        raise _unmeetable("kl_added", "0, which the first form itself has, or more", kl_added)
    if top1_drop is not None and not 0 <= top1_drop < 1:
        raise _unmeetable("top1_drop", "a share from 0, which is float's own, to below 1", top1_drop)
    if limit is not None and not 0 < limit < math.inf:
        raise _unmeetable("limit", "a number above 0", limit)
    if top1_drop is not None and labels is None:
        do = "pass labels=, or agreement= without any"
        raise failure("tune", "top1_drop", expected="labels of the images", got="none", do=do)
    return Budget(**given)


def warn_of_few(budget: Budget, images: int) -> None:
    """Warn (PTQWarning) where so few images cannot tell the agreement that is asked for from all of them."""
    asked = budget.agreement
    if asked is not None and asked < 1 and images * (1 - asked) < 1:
        needed = math.ceil(1 / (1 - asked))
        warn(f"tune: {images} images tell {asked:.1%} from 100 % not at all: all must agree; {needed} or more would")


def _unmeetable(name: str, expected: str, got: float) -> PTQError:
    return failure("tune", name, expected=expected, got=f"{got:g}", do="ask for less than float gives")
