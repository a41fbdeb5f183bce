"""What a product takes in each of its forms: seconds of an image, bytes of a file, bits, or multiplications."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from ptq4vit_fx.errors import unknown_name
from ptq4vit_fx.export.contract import Target
from ptq4vit_fx.export.proof.product_timing import ProductShapes
from ptq4vit_fx.quantizers import FLOAT_BITS, TwinUniform, Unquantized
from ptq4vit_fx.tuning.forms import Candidates, Form, Pair
from ptq4vit_fx.tuning.timings import Timings

Quantity = Literal["time", "size", "average bits", "multiplications"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
#: Bytes of a weight's value in float.
FLOAT_BYTES = 4.0
#: A float multiplication counts as so many of int8: as many of these fill its lanes.
FLOAT_MULTIPLICATIONS = 4
#: How a sum over all products is printed: a factor, and its unit.
UNITS: Mapping[Quantity, tuple[float, str]] = {
    "time": (1e3, "ms per image in products"),
    "size": (1e-6, "MB of weights"),
    "average bits": (1.0, "bits on average"),
    "multiplications": (1e-9, "G multiplications an image"),
}


def check_quantity(name: str) -> Quantity:
    """Return what is to be small; raises PTQError, with near names, if nothing is called so."""
    if name not in QUANTITIES:
        raise unknown_name("tune", "minimize", name, QUANTITIES)
    return name


def takes_of(
    candidates: Candidates,
    quantity: Quantity,
    shapes: Mapping[str, ProductShapes],
    target: Target,
    opset: int,
    timings: Timings | None,
) -> dict[str, dict[Form, float]]:
    """Return product -> form -> what it takes; sums over products are what the whole takes.

    timings: needed for "time", of all but convolutions; fewer than 8 bits take the time of 8. Of bits a product adds
    its share of the multiplications times the mean of both operands'. Exact twins multiply twice.
    """
    packed = target.packed(opset)
    counts = {name: candidates.plan.multiplications.get(name, 0) or 1 for name in candidates.pairs}
    total = sum(counts.values())
    found: dict[str, dict[Form, float]] = {}
    for name, own in candidates.pairs.items():
        for form, pair in own.items():
            if quantity == "time":
                taken = _seconds(shapes[name], pair, timings)
            elif quantity == "size":
                taken = _bytes(shapes[name], pair, packed)
            elif quantity == "multiplications":
                taken = float(counts[name] * (_branches(pair) or FLOAT_MULTIPLICATIONS))
            else:
                bits = (FLOAT_BITS, FLOAT_BITS) if pair is None else tuple(quantizer.bits for quantizer in pair)
                taken = counts[name] / total * sum(bits) / 2
            found.setdefault(name, {})[form] = taken
    return found


def _seconds(shapes: ProductShapes, pair: Pair | None, timings: Timings | None) -> float:
    """Return the seconds of a product; 0 of a convolution, which runtimes compute in float, quantized or not."""
    if shapes.kind == "conv2d":
        return 0.0
    assert timings is not None
    return timings.seconds(shapes, _branches(pair))


def _branches(pair: Pair | None) -> int:
    """Return how many integer products a form is; 0 if it multiplies floats."""
    if pair is None or any(isinstance(quantizer, Unquantized) for quantizer in pair):
        return 0
    return 2 if any(isinstance(quantizer, TwinUniform) for quantizer in pair) else 1


def _bytes(shapes: ProductShapes, pair: Pair | None, packed: int) -> float:
    if not shapes.rhs_is_weight:
        return 0.0
    each = FLOAT_BYTES if pair is None else 0.5 if pair[1].bits <= packed else 1.0
    return math.prod(shapes.rhs) * each


def told(value: float, quantity: Quantity) -> str:
    """Return a sum as the reports print it."""
    factor, unit = UNITS[quantity]
    return f"{factor * value:.3g} {unit}"
