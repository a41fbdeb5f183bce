"""From options of `ptq4vit quantize` to a QConfigMapping: the recipe, its bits, what is set of some products."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, cast

from ptq4vit_fx import recipes
from ptq4vit_fx.errors import failure, quoted, some_names
from ptq4vit_fx.names import is_meant
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.qconfig import QConfigMapping

#: Recipe -> what it takes as twins, and as granularity of weights, its own one first.
TWINS = ("exact", "wide", "uniform", "auto")
CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "best": (TWINS, ("channel", "tensor", "group")),
    "ptq4vit": (TWINS, ("channel", "tensor", "group")),
    "tensorrt": (("exact",), ("channel",)),
    "base": (("exact",), ("tensor",)),
}
BITS = re.compile(r"(?:w(\d+))?(?:a(\d+))?", re.IGNORECASE)
FLOAT = "float"


def mapping_of(
    recipe: str, twins: str, w_bits: int, a_bits: int, weights: str | None, settings: Sequence[str]
) -> QConfigMapping:
    """Return the recipe of that name, with these settings.

    weights: how many scales a weight has, None for the recipe's own. settings: `name=w8a8` or `name=float`, the name
    that of a product or a module, or a pattern. Raises PTQError on a recipe that does not exist or does not go with
    the other options, and on settings that cannot be read.
    """
    if recipe not in CHOICES:
        expected = "best, ptq4vit, tensorrt or base"
        raise failure("quantize", "--recipe", expected=expected, got=repr(recipe), do="choose one")
    kinds, granularities = CHOICES[recipe]
    _check("--twins", twins, kinds, recipe)
    _check("--weights-granularity", weights or granularities[0], granularities, recipe)
    return with_settings(_recipe(recipe, twins, w_bits, a_bits, weights), settings)


def _check(option: str, value: str, choices: tuple[str, ...], recipe: str) -> None:
    if value not in choices:
        expected = f"{' or '.join(choices)} with the recipe {recipe}"
        raise failure("quantize", option, expected=expected, got=quoted(value), do="choose one")


def _recipe(recipe: str, twins: str, w_bits: int, a_bits: int, weights: str | None) -> QConfigMapping:
    if recipe == "tensorrt":
        return recipes.tensorrt(w_bits, a_bits)
    if recipe == "base":
        return recipes.base_ptq(w_bits, a_bits)
    searched = cast("Literal['exact', 'wide', 'uniform']", "exact" if twins == "auto" else twins)
    granularity = cast("Literal['channel', 'tensor', 'group']", weights or "channel")
    return {"best": recipes.best, "ptq4vit": recipes.ptq4vit}[recipe](w_bits, a_bits, granularity, searched)


def with_settings(mapping: QConfigMapping, settings: Sequence[str]) -> QConfigMapping:
    """Return the mapping with what was set of some products; the last setting of a product wins."""
    for setting in settings:
        name, w, a = _read(setting)
        mapping = mapping.skipping(name) if w is None and a is None else mapping.with_bits(name, w=w, a=a)
    return mapping


def _read(setting: str) -> tuple[str, int | None, int | None]:
    """Return the name, the bits of weights and those of activations; of `float`, no bits."""
    name, _, value = setting.rpartition("=")
    found = BITS.fullmatch(value)
    if not name or not value or (found is None and value != FLOAT):
        expected, do = "NAME=w8a8, NAME=w4, NAME=a8 or NAME=float", "write --set 'blocks.*.mlp.fc2=w8a8'"
        raise failure("quantize", "--set", expected=expected, got=quoted(setting), do=do)
    w, a = (None if bits is None else int(bits[:9]) for bits in (found.groups() if found else (None, None)))
    return name, w, a


def set_apart(mapping: QConfigMapping, plan: QuantPlan) -> int:
    """Return how many products have the bits of a setting."""
    patterns = [change.pattern for change in mapping.changes if not change.leaves_float]
    return sum(any(is_meant(op.name, pattern) for pattern in patterns) for op in plan.ops)


def said_of(settings: Sequence[str], skip: Sequence[str], plan: QuantPlan) -> list[str]:
    """Return one line for each setting, and each name that is skipped: the products that it matches."""
    names = [*(op.name for op in plan.ops), *(op.name for op in plan.float_ops)]
    lines = []
    asked = [(f"--set {setting}", _read(setting)[0]) for setting in settings] + [(f"--skip {x}", x) for x in skip]
    for option, pattern in asked:
        meant = [name for name in names if is_meant(name, pattern)]
        lines.append(f"{option}: {len(meant)} product{'s' * (len(meant) != 1)}, {some_names(meant)}")
    return lines
