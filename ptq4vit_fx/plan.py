"""Sites, products and the plan: which operand of which product gets which quantizer. Values, never fx nodes."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vit_fx.activations import NEGATIVE_RANGE, SourceActivation
from ptq4vit_fx.balances import Balance
from ptq4vit_fx.errors import failure, quoted, unknown_name
from ptq4vit_fx.inputs.records import Place, read_as, read_json
from ptq4vit_fx.inputs.settings import LOSSES, SearchSettings, Transforms
from ptq4vit_fx.names import OPERANDS, Operand, Site, site
from ptq4vit_fx.product_forms import ProductKind
from ptq4vit_fx.quantizers import Quantizer, Unquantized, describe_quantizer, quantizer_to_dict
from ptq4vit_fx.views.tabular import Tabular


@dataclass(frozen=True)
class QuantOp:
    """A product out = f(lhs, rhs). The rhs of a linear or conv2d is its weight.

    stride, padding, dilation and groups are the convolution's; padding is a pair or "same" / "valid".
    Raises PTQError on a source that is no known activation, and on sizes that no convolution has.
    """

    name: str
    kind: ProductKind
    lhs_source: SourceActivation | None = None
    rhs_source: SourceActivation | None = None
    rhs_is_weight: bool = False
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | Literal["same", "valid"] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for source in (self.lhs_source, self.rhs_source):
            if source is not None and source not in NEGATIVE_RANGE:
                raise unknown_name("QuantOp", "source", source, NEGATIVE_RANGE)
        padding = (0, 0) if isinstance(self.padding, str) else self.padding
        if min(*self.stride, *self.dilation, self.groups) < 1 or min(padding) < 0:
            do = "write those that torch.nn.functional.conv2d takes"
            raise failure("QuantOp", "convolution", expected="positive sizes", got=quoted(self), do=do)

    def source(self, operand: Operand) -> SourceActivation | None:
        """Return the activation function that this operand comes out of, if any."""
        return self.lhs_source if operand == "lhs" else self.rhs_source

    def scale_axis(self, operand: Operand) -> int:
        """Return the dimension along which several scales of an operand lie: a weight's columns, else the heads."""
        if operand == "lhs" or not self.rhs_is_weight:
            return -3
        return -1 if self.kind == "matmul" else 0

    def compute(self, lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of two operands, shaped as in the graph."""
        if self.kind == "linear":
            return F.linear(lhs, rhs, bias)
        if self.kind == "conv2d":
            return F.conv2d(lhs, rhs, bias, self.stride, self.padding, self.dilation, self.groups)
        return torch.matmul(lhs, rhs)


@dataclass(frozen=True)
class FloatOp:
    """A product (or a module that hides products) that stays float, and why; asked: whether a rule leaves it float."""

    name: str
    reason: str
    asked: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Transformed:
    """A place where a transform of `Transforms` was, or would have been, applied.

    transform: its field. name: the module or product. done: whether it was. note: how, or why not.
    """

    transform: str
    name: str
    done: bool
    note: str


@dataclass(frozen=True, repr=False)
class QuantPlan(Tabular):
    """What `annotate` decided: the products in execution order, a quantizer per site, the search per product.

    transforms: what the mapping asks for. balances: channels whose scales and shifts a calibration holds. transformed:
    where transforms were done, and where not, with the reason. recipe: the name of the mapping that it was made from;
    rules that were added to it show in the quantizers alone. loss: what weighs the search, unless `calibrate` is given
    another. multiplications: product -> how many one image takes, of float ones too; plans of before have none.
    Raises PTQError if two products have one name, or if the sites are not both operands of every product.
    """

    ops: tuple[QuantOp, ...]
    quantizers: dict[Site, Quantizer]
    searches: dict[str, SearchSettings] = field(default_factory=dict)
    float_ops: tuple[FloatOp, ...] = ()
    transforms: Transforms = field(default_factory=Transforms)
    balances: tuple[Balance, ...] = ()
    transformed: tuple[Transformed, ...] = field(default=(), compare=False)
    recipe: str = field(default="custom", compare=False)
    loss: str = field(default=LOSSES[0], compare=False)
    multiplications: dict[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        names = [op.name for op in self.ops]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            do = "name them apart"
            raise failure("QuantPlan", quoted(repeated[0]), expected="one product of that name", got="more", do=do)
        sites = {site(name, operand) for name in names for operand in OPERANDS}
        for strange in sorted(sites ^ self.quantizers.keys())[:1]:
            expected = "a quantizer for both operands of every product, and for nothing else"
            got = "none" if strange in sites else "a quantizer of no operand"
            raise failure("QuantPlan", quoted(strange), expected=expected, got=got, do="give each operand its own")

    @property
    def grids(self) -> dict[Site, Quantizer]:
        """The quantizers that have codes: of all sites but those of activations beside a weight quantized alone."""
        return {key: own for key, own in self.quantizers.items() if not isinstance(own, Unquantized)}

    def op(self, name: str) -> QuantOp:
        """Return the product called `name`; KeyError if there is none."""
        for op in self.ops:
            if op.name == name:
                return op
        raise KeyError(name)

    def to_json(self) -> str:
        """Return the plan as JSON text; `from_json` gives an equal plan back."""
        record = {
            "ops": [asdict(op) for op in self.ops],
            "quantizers": {key: quantizer_to_dict(value) for key, value in self.quantizers.items()},
            "searches": {key: asdict(value) for key, value in self.searches.items()},
            "float_ops": [asdict(op) for op in self.float_ops],
            "transforms": asdict(self.transforms),
            "balances": [asdict(balance) for balance in self.balances],
            "transformed": [asdict(place) for place in self.transformed],
            "recipe": self.recipe,
            "loss": self.loss,
            "multiplications": self.multiplications,
        }
        return json.dumps(record, indent=1)

    @staticmethod
    def from_json(text: str, operation: str = "QuantPlan.from_json", subject: str = "plan") -> QuantPlan:
        """Return the plan that `to_json` wrote; raises PTQError, and nothing else, on any other text.

        operation, subject: what reads it, and from which file, for that error.
        """
        place = Place(operation, subject)
        return cast("QuantPlan", read_as(QuantPlan, read_json(text, place), place))

    def brief(self) -> str:
        """Return how many products are quantized, and how many stay float."""
        quantized = f"{len(self.ops)} products, {len(self.grids)} sites"
        return f"{quantized}, {len(self.float_ops)} left float, recipe {self.recipe}"

    def records(self) -> list[dict[str, Any]]:
        """Return a dictionary per product, JSON-ready: its kind, the quantizer of each operand; why it stays float."""
        rows: list[dict[str, Any]] = []
        for op in self.ops:
            described: dict[str, str] = {
                operand: describe_quantizer(self.quantizers[site(op.name, operand)]) for operand in OPERANDS
            }
            rows.append({"product": op.name, "kind": op.kind, **described})
        return rows + [{"product": op.name, "kind": "float", "lhs": op.reason, "rhs": ""} for op in self.float_ops]

    def table(self) -> str:
        """Return a text table: product, kind, quantizer of each operand; then what is left, with the reason."""
        rows = [("product", "kind", "lhs", "rhs"), *(tuple(record.values()) for record in self.records())]
        rows += [(place.name, f"no {place.transform}", place.note, "") for place in self.transformed if not place.done]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
        return "\n".join([*lines, *([f"average bits: {self.average_bits()}"] if self.multiplications else [])])

    def average_bits(self) -> AverageBits:
        """Return the mean width of weights and of activations, each product weighted by its multiplications."""
        weights, activations, planned = list[tuple[int, int]](), list[tuple[int, int]](), set[str]()
        for op in self.ops:
            planned.add(op.name)
            for operand in OPERANDS:
                into = weights if op.rhs_is_weight and operand == "rhs" else activations
                into.append((self.multiplications.get(op.name, 0), self.quantizers[site(op.name, operand)].bits))
        left = sum(count for name, count in self.multiplications.items() if name not in planned)
        total = left + sum(self.multiplications.get(name, 0) for name in planned)
        return AverageBits(_mean(weights), _mean(activations), left / total if total else 0.0)


@dataclass(frozen=True)
class AverageBits:
    """Mean bits of the quantized weights and activations, by multiplications; left: their share in float products."""

    weights: float
    activations: float
    left: float

    def __str__(self) -> str:
        told = f"weights {self.weights:.2f}, activations {self.activations:.2f}, weighted by multiplications"
        return told + (f"; {self.left:.1%} of these are in float" if self.left else "")


def _mean(weighted: list[tuple[int, int]]) -> float:
    total = sum(count for count, _ in weighted)
    return sum(count * bits for count, bits in weighted) / total if total else math.nan
