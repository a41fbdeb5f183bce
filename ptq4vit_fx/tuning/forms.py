"""The forms that a product may have: float, or quantized to so many bits, with twins or uniform quantizers only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch.fx import GraphModule, Node

from ptq4vit_fx.errors import failure, quoted, some_names
from ptq4vit_fx.export.contract import Target, check_weights_alone
from ptq4vit_fx.names import OPERANDS, site
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.dataflow import origin
from ptq4vit_fx.passes.graph.marks import planned_products
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import FLOAT_BITS, Quantizer, TwinUniform, Uniform, Unquantized, of_bits

_SPELLED = re.compile(r"[wW](\d)[aA](\d{1,2})( uniform)?")


@dataclass(frozen=True)
class Form:
    """Bits of a product's weight and of its activations, and whether these may have twins; no bits: it is float.

    With 32 bits of activations weights alone are quantized, and products of two activations are float. Else what the
    image is quantized to stays what the recipe says: it is 8-bit data. own: the bits are those of the plan.
    """

    weights: int = 0
    activations: int = 0
    twins: bool = True
    own: bool = False

    @property
    def name(self) -> str:
        """`float`, `w8a8`, or `w8a8 uniform` without twins; `exact` or `uniform` in own bits; `form_of` reads it."""
        if self.own:
            return "exact" if self.twins else "uniform"
        if not self.weights:
            return "float"
        return f"w{self.weights}a{self.activations}" + ("" if self.twins else " uniform")


FLOAT = Form()
#: As the plan says, and the same with uniform quantizers in the place of twins.
EXACT, UNIFORM = Form(own=True), Form(own=True, twins=False)
#: Bits that a quantizer may have.
BITS = range(2, 9)
#: What is tried by default for each quantity that `tune` makes small. Float stands last: of two that cost and take the
#: same the first is chosen. Fewer than 8 bits save no time and, but where a target packs weights, no bytes; there
#: activations of 8 bits would be slower than float ones, as no CPU multiplies them with weights of 4 (docs/speed.md).
DEFAULT_FORMS: Mapping[str, tuple[Form, ...]] = {
    "time": (Form(8, 8), Form(8, 8, twins=False), FLOAT),
    "size": (Form(8, 8), Form(4, 8), FLOAT),
    "average bits": (Form(8, 8), Form(6, 6), Form(4, 6), Form(4, 4), FLOAT),
    "multiplications": (EXACT, UNIFORM),
}
PACKED_FORMS = (Form(8, 8), Form(4, FLOAT_BITS), FLOAT)


def default_forms(quantity: str, target: Target) -> tuple[Form, ...]:
    """Return what is tried of a quantity that `tune` makes small, in a target."""
    packed = quantity == "size" and target.packed_bits > 0 and target.weights_alone
    return PACKED_FORMS if packed else DEFAULT_FORMS[quantity]


def form_of(name: str, operation: str = "tune") -> Form:
    """Return the form of that name; raises PTQError on any other text."""
    spelled = _SPELLED.fullmatch(name)
    bits = [int(spelled[place]) for place in (1, 2)] if spelled else []
    named = next((form for form in (FLOAT, EXACT, UNIFORM) if form.name == name), None)
    if named is not None:
        return named
    alone = bits[1:] == [FLOAT_BITS] and spelled is not None and spelled[3] is None
    if spelled is None or not all(width in BITS for width in (bits[:1] if alone else bits)):
        expected = "float, exact, uniform, or bits such as w8a8, w4a8, 'w8a8 uniform' or w4a32"
        do = "spell it so, with 2 to 8 bits, or 32 of activations"
        raise failure(operation, "form", expected=expected, got=quoted(name), do=do)
    return Form(bits[0], bits[1], twins=spelled[3] is None)


def held_forms(forms: Iterable[Form], target: Target, operation: str = "tune") -> tuple[Form, ...]:
    """Return the forms; raises PTQError if the target cannot hold one of them, or if only float is left."""
    given = tuple(dict.fromkeys(forms))
    for form in given:
        if form.activations == FLOAT_BITS:
            check_weights_alone(target, form.name, operation)
        elif form != FLOAT and not form.own and form.activations not in target.activation_bits:
            held = ", ".join(map(str, target.activation_bits))
            do = "leave that form out, or choose another target"
            expected = f"activations of {held} bits"
            raise failure(operation, f"target {target.name}", expected=expected, got=form.name, do=do)
    if not any(form != FLOAT for form in given):
        do, got = "name a form that is quantized, such as w8a8", some_names(form.name for form in given) or "none"
        raise failure(operation, "forms", expected="one that is quantized", got=got, do=do)
    return given


#: The quantizers of a product's lhs and rhs.
Pair = tuple[Quantizer, Quantizer]


@dataclass(frozen=True)
class Candidates:
    """The products of a prepared model, each with the quantizers of the forms that differ for it, in the given order.

    plan: of the model. pairs: product -> form -> quantizers of lhs and rhs, None of float. same: product -> every form
    -> the one of `pairs` that it is for this product.
    """

    plan: QuantPlan
    forms: tuple[Form, ...]
    pairs: dict[str, dict[Form, Pair | None]]
    same: dict[str, dict[Form, Form]]

    def as_form(self, product: str, form: Form) -> Form:
        """Return the form among a product's own that gives it the same quantizers as this one of `forms`."""
        return self.same[product][form]

    def plan_of(self, form: Form) -> QuantPlan:
        """Return the plan of the products that have this form as one of their own, searched as the model's are."""
        chosen = {name: pair for name, own in self.pairs.items() if (pair := own.get(form)) is not None}
        return plan_with(self.plan, chosen)


def plan_with(plan: QuantPlan, pairs: Mapping[str, Pair]) -> QuantPlan:
    """Return a plan of these products alone, with these quantizers."""
    quantizers = {
        site(name, operand): quantizer
        for name, pair in pairs.items()
        for operand, quantizer in zip(OPERANDS, pair, strict=True)
    }
    ops = tuple(op for op in plan.ops if op.name in pairs)
    return replace(plan, ops=ops, quantizers=quantizers)


def candidates_of(prepared: GraphModule, forms: Iterable[Form]) -> Candidates:
    """Return what each product of a prepared model can be; of forms that give it the same quantizers, the first."""
    plan, given = plan_of(prepared), tuple(forms)
    found, same = dict[str, dict[Form, Pair | None]](), dict[str, dict[Form, Form]]()
    nodes = {name: node for node, name in planned_products(prepared.graph)}
    for name in (op.name for op in plan.ops):
        own = found[name] = {}
        same[name] = {}
        for form in given:
            pair = None if form == FLOAT else _pair(plan, nodes[name], name, form)
            first = FLOAT if pair is None else form
            same[name][form] = next((known for known, other in own.items() if other == pair), first)
            own.setdefault(same[name][form], pair)
    return Candidates(plan, given, found, same)


def _pair(plan: QuantPlan, node: Node, name: str, form: Form) -> Pair | None:
    """Return the quantizers of a form, None if both operands stay float."""
    op = plan.op(name)
    if form.activations == FLOAT_BITS:
        weight = plan.quantizers[site(name, "rhs")]
        return (Unquantized(), of_bits(weight, form.weights)) if op.rhs_is_weight else None
    found = []
    for operand, value in zip(OPERANDS, node.args[:2], strict=True):
        quantizer, source = plan.quantizers[site(name, operand)], cast("Node", value)
        if origin(source).op == "placeholder":
            found.append(quantizer)
        elif operand == "rhs" and op.rhs_is_weight:
            found.append(quantizer if form.own else of_bits(quantizer, form.weights))
        else:
            per_head = op.kind == "matmul" and len(shape_of(source)) == 4
            found.append(_activation(quantizer, form, per_head=per_head))
    return found[0], found[1]


def _activation(quantizer: Quantizer, form: Form, *, per_head: bool) -> Quantizer:
    quantizer = quantizer if form.own else of_bits(quantizer, form.activations)
    if isinstance(quantizer, TwinUniform) and not form.twins:
        return uniform_in_place_of(quantizer, per_head=per_head)
    return quantizer


def uniform_in_place_of(twin: TwinUniform, *, per_head: bool) -> Uniform:
    """Return a uniform quantizer of as many bits, no code of which is wasted below the lowest value."""
    if twin.form == "gelu":
        return Uniform(twin.bits, signed=False, minimum=twin.minimum)
    return Uniform(twin.bits, signed=False, granularity="head" if per_head else "tensor")
