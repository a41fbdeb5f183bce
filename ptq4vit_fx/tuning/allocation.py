"""One form per product: the least time, size or bits that a budget allows, solved exactly (HiGHS, by scipy's milp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

#: What a second solution, which is to cost less, may take more than the first, relative: solvers round.
SLACK = 1e-9
#: The largest number of a bound as HiGHS is given it: it holds bounds up to 1e-6, whatever their size.
TIGHT = 1e4


@dataclass(frozen=True)
class Option:
    """A form of a product: what it costs (divergence, distance), and what it takes (seconds, bytes, bits)."""

    name: str
    cost: float
    takes: float


def allocate(
    options: Mapping[str, Sequence[Option]], *, cost: float | None = None, takes: float | None = None
) -> dict[str, str] | None:
    """Return product -> the name of an option, one of each; None if nothing keeps within the bound.

    cost: the sum of costs is at most that, and what is taken in all is the least possible; of choices that take the
    same the one that costs least. takes: the other way round. Exact: no gap is left between the choice and the bound.
    Equal options are chosen in their order.
    """
    left = {product: _undominated(own) for product, own in options.items()}
    flat = [(product, option) for product, own in left.items() for option in own]
    if not flat:
        return {}
    costs, taken = (np.array([getattr(option, name) for _, option in flat]) for name in ("cost", "takes"))
    bounded, wanted, bound = (costs, taken, cost) if cost is not None else (taken, costs, takes)
    assert bound is not None
    rows = list(left)
    one_each = np.zeros((len(rows), len(flat)))
    for column, (product, _) in enumerate(flat):
        one_each[rows.index(product), column] = 1
    first = _solved(wanted, one_each, [(bounded, bound)])
    if first is None:
        return None
    least = float(wanted @ first)
    second = _solved(bounded, one_each, [(bounded, bound), (wanted, least + SLACK * max(abs(least), wanted.max()))])
    chosen = first if second is None else second
    return {product: option.name for (product, option), taken_ in zip(flat, chosen, strict=True) if taken_}


def _undominated(options: Sequence[Option]) -> list[Option]:
    """Return the options but those than which another one costs and takes no more; of equal ones the first stays."""

    def better(other: Option, place: int, one: Option, own: int) -> bool:
        no_more = other.cost <= one.cost and other.takes <= one.takes
        return no_more and ((other.cost, other.takes) != (one.cost, one.takes) or place < own)

    return [one for own, one in enumerate(options) if not any(better(o, i, one, own) for i, o in enumerate(options))]


def _solved(
    objective: NDArray[Any], one_each: NDArray[Any], bounds: Sequence[tuple[NDArray[Any], float]]
) -> NDArray[Any] | None:
    """Return 0 or 1 for every option, the least sum of the objective with one option of each product."""
    constraints = [LinearConstraint(one_each, 1, 1)]
    for values, bound in bounds:
        size = (max(float(np.abs(values).max()), abs(bound)) or 1.0) / TIGHT
        constraints.append(LinearConstraint(values[None] / size, -np.inf, bound / size))
    scale = float(np.abs(objective).max()) or 1.0
    found = milp(
        objective / scale,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    return None if found.x is None else np.round(found.x)
