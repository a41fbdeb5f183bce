"""What a product is: the three operations that are quantized, the canonical call of each, its other spellings."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

ProductKind = Literal["linear", "conv2d", "matmul"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ProductForm:
    """One kind of product out = f(lhs, rhs).

    function: its canonical call, with exactly the positional arguments `parameters`; defaults are those of the last
    ones. module: the class of torch.nn that computes it. spellings: functions, names of methods and operators of
    torch.export that compute the same; aliases: what these call a parameter.
    """

    kind: ProductKind
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    defaults: tuple[Any, ...] = ()
    module: type[nn.Module] | None = None
    spellings: tuple[Any, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Return the positional arguments of the canonical call, None if the call has others (`out=`)."""
        aliases = dict(self.aliases)
        named = {aliases.get(name, name): value for name, value in kwargs.items()}
        bound = dict(zip(self.parameters[len(self.parameters) - len(self.defaults) :], self.defaults, strict=True))
        bound |= dict(zip(self.parameters, args, strict=False)) | named
        if len(args) > len(self.parameters) or bound.keys() != set(self.parameters):
            return None
        values = [bound[name] for name in self.parameters]
        if self.kind == "conv2d":
            values[3:6] = [value if isinstance(value, str) else _pair(value) for value in values[3:6]]
        return tuple(values)


FORMS = (
    ProductForm(
        *("linear", F.linear, ("input", "weight", "bias"), (None,), nn.Linear), spellings=(aten.linear.default,)
    ),
    ProductForm(
        "conv2d",
        F.conv2d,
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
        (None, (1, 1), (0, 0), (1, 1), 1),
        nn.Conv2d,
        (torch.conv2d, aten.conv2d.default, aten.conv2d.padding),
    ),
    ProductForm(
        "matmul",
        torch.matmul,
        ("input", "other"),
        spellings=(
            *(operator.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", "__matmul__"),
            *(aten.matmul.default, aten.bmm.default, aten.mm.default),
        ),
        aliases=(("mat2", "other"), ("tensor2", "other"), ("self", "input")),
    ),
)

#: Canonical function -> its form.
PRODUCTS: dict[Any, ProductForm] = {form.function: form for form in FORMS}
_BY_SPELLING: dict[Any, ProductForm] = {
    spelling: form for form in FORMS for spelling in (form.function, *form.spellings)
}


def form_of(target: Any) -> ProductForm | None:
    """Return the kind of product that a function, a method's name or an operator is a spelling of, None if of none."""
    return _BY_SPELLING.get(target)


def _pair(value: Any) -> tuple[Any, ...]:
    return (value, value) if isinstance(value, int) else tuple(value) * (3 - len(value))
