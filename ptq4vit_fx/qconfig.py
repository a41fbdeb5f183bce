"""QConfig and QConfigMapping: what to quantize and how, with torch.ao's methods and precedence."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ptq4vit_fx.errors import failure, unknown_name
from ptq4vit_fx.inputs.changes import Change, listed
from ptq4vit_fx.inputs.settings import LOSSES, SearchSettings, Transforms
from ptq4vit_fx.names import is_inside, is_meant
from ptq4vit_fx.product_forms import FORMS
from ptq4vit_fx.quantizers import (
    FLOAT_BITS,
    Quantizer,
    Uniform,
    Unquantized,
    check_activation_bits,
    check_bits,
    of_bits,
)
from ptq4vit_fx.views.rules import rules_of
from ptq4vit_fx.views.tabular import Tabular

#: Object types that users may name, and the kind of product that each stands for.
OBJECT_KINDS: dict[Any, str] = {
    name: form.kind for form in FORMS for name in (form.module, form.function, *form.spellings) if callable(name)
}


@dataclass(frozen=True)
class QConfig:
    """Quantizers of one product's operands; None leaves that operand float (and the whole product with it).

    `Unquantized()` leaves an activation float beside a quantized weight.

    activation: input of a linear or convolution. weight: its weight. matmul: operands of a product of two
    activations. softmax, gelu: operands that come out of a softmax or a GELU; None treats them like any other.
    convolved: the same of a GELU, or SiLU, where a convolution reads it; None takes that of `gelu`.
    kernel: weight of a convolution; image: what the model is given; None treats them like any other.
    """

    activation: Quantizer | None = field(default_factory=Uniform)
    weight: Uniform | None = field(default_factory=Uniform)
    matmul: Quantizer | None = field(default_factory=Uniform)
    softmax: Quantizer | None = None
    gelu: Quantizer | None = None
    convolved: Quantizer | None = None
    kernel: Uniform | None = None
    image: Quantizer | None = None
    search: SearchSettings = field(default_factory=SearchSettings)

    def with_bits(self, w: int | None, a: int | None) -> QConfig:
        """Return a copy with other bits, None for those that it has; the image keeps its own, which are its data's.

        With a=32 activations stay float, the image too. Raises PTQError on fewer bits for activations that do.
        """
        activations = ("activation", "matmul", "softmax", "gelu", "convolved")
        if a == FLOAT_BITS:
            changed: dict[str, Any] = dict.fromkeys((*activations, "image"), Unquantized())
            return replace(self.with_bits(w, None), **changed)
        bits: dict[str, Any] = dict.fromkeys(("weight", "kernel"), w) | dict.fromkeys(activations, a)
        quantizers = {name: getattr(self, name) for name, number in bits.items() if number is not None}
        changed = {name: q and of_bits(q, bits[name]) for name, q in quantizers.items()}
        return replace(self, **changed)


class QConfigMapping(Tabular):
    """Rules from products to `QConfig`, in torch.ao's order of precedence, lowest first.

    `set_global`, `set_object_type` (nn.Linear, nn.Conv2d, torch.matmul), `set_module_name_regex` (`re.match` on the
    name; the first registered match wins) and `set_module_name` (an op, or a module whose ops it covers; the longest
    match wins). A later call with the same key replaces the earlier one. A QConfig of None leaves the op float.
    Each of these returns the mapping itself, so that calls chain. `with_bits` and `skipping` change, in a copy, what
    the rules give: products keep their quantizers, search and transforms.
    """

    def __init__(self, recipe: str = "custom") -> None:
        """Start empty; recipe: a name for the record that plans and files keep, such as `ptq4vit(8, 8)`."""
        self.recipe = recipe
        self.transforms = Transforms()
        self.loss = LOSSES[0]
        self.global_qconfig: QConfig | None = None
        self.object_types: dict[Any, QConfig | None] = {}
        self.module_name_regexes: dict[str, QConfig | None] = {}
        self.module_names: dict[str, QConfig | None] = {}
        self.changes: tuple[Change, ...] = ()

    def set_global(self, qconfig: QConfig | None) -> QConfigMapping:
        """Use `qconfig` where nothing more specific matches."""
        self.global_qconfig = qconfig
        return self

    def set_object_type(self, object_type: Any, qconfig: QConfig | None) -> QConfigMapping:
        """Use `qconfig` for every product of this type; raises PTQError if products have no such type."""
        if object_type not in OBJECT_KINDS:
            expected, do = "one of nn.Linear, nn.Conv2d, torch.matmul", "call set_module_name or set_module_name_regex"
            raise failure("set_object_type", repr(object_type), expected=expected, got=repr(object_type), do=do)
        self.object_types[object_type] = qconfig
        return self

    def set_module_name_regex(self, pattern: str, qconfig: QConfig | None) -> QConfigMapping:
        """Use `qconfig` for products whose name matches the regular expression; raises PTQError if it is none."""
        try:
            re.compile(pattern)
        except re.error as error:
            expected, do = "a regular expression", "escape it or use set_module_name"
            raise failure("set_module_name_regex", repr(pattern), expected=expected, got=str(error), do=do) from error
        self.module_name_regexes[pattern] = qconfig
        return self

    def set_module_name(self, name: str, qconfig: QConfig | None) -> QConfigMapping:
        """Use `qconfig` for the product called `name`, or for every product inside the module called so."""
        self.module_names[name] = qconfig
        return self

    def brief(self) -> str:
        """Return the recipe's name, and how many rules there are."""
        return f"{self.recipe}, {len(self.records())} rules"

    def records(self) -> list[dict[str, Any]]:
        """Return a dictionary per rule, JSON-ready, lowest precedence first; without quantizers: it leaves float."""
        return rules_of(self)

    def resolve(self, name: str, kind: str) -> tuple[QConfig | None, str | None]:
        """Return the QConfig of a product and the rule that gave it (None if no rule matches)."""
        qconfig, rule = self._rule(name, kind)
        skipped = None
        for change in self.changes:
            if is_meant(name, change.pattern):
                skipped = change if change.leaves_float else None
                qconfig = qconfig if qconfig is None or skipped else qconfig.with_bits(change.w, change.a)
        return (qconfig, rule) if skipped is None else (None, f"skip {skipped.pattern!r}")

    def leaves_float(self, name: str) -> bool:
        """Return whether a rule says of a product, of whatever kind, that it stays float."""
        qconfig, rule = self.resolve(name, "")
        return qconfig is None and rule is not None

    def _rule(self, name: str, kind: str) -> tuple[QConfig | None, str | None]:
        owners = [owner for owner in self.module_names if is_inside(name, owner)]
        if owners:
            owner = max(owners, key=len)
            return self.module_names[owner], f"module name {owner!r}"
        for pattern, qconfig in self.module_name_regexes.items():
            if re.match(pattern, name):
                return qconfig, f"module name pattern {pattern!r}"
        for object_type, qconfig in self.object_types.items():
            if OBJECT_KINDS[object_type] == kind:
                return qconfig, f"object type {OBJECT_KINDS[object_type]!r}"
        return self.global_qconfig, None if self.global_qconfig is None else "global"

    def unmatched(self, products: list[tuple[str, str]], hidden: Sequence[str] = ()) -> list[tuple[str, str]]:
        """Return (what sets it, its key) of every rule and change that matches none of the (name, kind) pairs.

        hidden: names of what multiplies and cannot be quantized, which may be skipped.
        """
        names = [name for name, _ in products]
        kinds = {kind for _, kind in products}
        missing = [
            ("QConfigMapping.set_module_name", owner)
            for owner in self.module_names
            if not any(is_inside(name, owner) for name in names)
        ]
        missing += [
            ("QConfigMapping.set_module_name_regex", pattern)
            for pattern in self.module_name_regexes
            if not any(re.match(pattern, name) for name in names)
        ]
        missing += [
            (change.operation, change.pattern)
            for change in self.changes
            if not any(is_meant(name, change.pattern) for name in (*names, *hidden))
        ]
        missing += [
            ("QConfigMapping.set_object_type", OBJECT_KINDS[object_type])
            for object_type in self.object_types
            if OBJECT_KINDS[object_type] not in kinds
        ]
        return missing

    def with_bits(self, names: str | Sequence[str], *, w: int | None = None, a: int | None = None) -> QConfigMapping:
        """Return a copy that gives these products or modules other bits, and leaves everything else of them as it is.

        names: of products or modules, or patterns of such: `blocks.0.mlp`, `blocks.*.mlp.fc2`, `blocks.[0-3]`. w, a:
        bits of weights and of activations; one of them alone leaves the other. Of this and `skipping` the last call on
        a product wins. a=32 leaves activations float, beside quantized weights. Raises PTQError on
        other bits than these and 2 to 8; `prepare_fx` does on a name of nothing.
        """
        if w is None and a is None:
            do = "call skipping to leave products float"
            raise failure("with_bits", "bits", expected="w, a or both", got="neither", do=do)
        if w is not None:
            check_bits("with_bits", w)
        if a is not None:
            check_activation_bits("with_bits", a)
        return self._changed([Change(name, w, a) for name in listed(names)])

    def skipping(self, names: str | Sequence[str]) -> QConfigMapping:
        """Return a copy that leaves modules or products float: names, or patterns as for `with_bits`."""
        return self._changed([Change(name) for name in listed(names)])

    def _changed(self, changes: Sequence[Change]) -> QConfigMapping:
        mapping = self._copy()
        mapping.changes = (*self.changes, *changes)
        return mapping

    def with_transforms(self, **changes: Any) -> QConfigMapping:
        """Return a copy whose `Transforms` have the given fields replaced."""
        mapping = self._copy()
        mapping.transforms = replace(self.transforms, **changes)
        return mapping

    def with_loss(self, loss: str) -> QConfigMapping:
        """Return a copy whose scales are weighted by another loss, where `calibrate` is not given one.

        loss: pseudo_label, fisher or projection, as for `calibrate`; raises PTQError on another name.
        """
        if loss not in LOSSES:
            raise unknown_name("with_loss", "loss", loss, LOSSES)
        mapping = self._copy()
        mapping.loss = loss
        return mapping

    def with_search(self, **changes: Any) -> QConfigMapping:
        """Return a copy in which every QConfig's search settings have the given fields replaced."""

        def changed(qconfig: QConfig | None) -> QConfig | None:
            return qconfig and replace(qconfig, search=replace(qconfig.search, **changes))

        mapping = self._copy()
        mapping.global_qconfig = changed(self.global_qconfig)
        mapping.object_types = {key: changed(value) for key, value in self.object_types.items()}
        mapping.module_name_regexes = {key: changed(value) for key, value in self.module_name_regexes.items()}
        mapping.module_names = {key: changed(value) for key, value in self.module_names.items()}
        return mapping

    def _copy(self) -> QConfigMapping:
        """Return a mapping of the same rules, which later calls on either change in that one alone."""
        mapping = copy.copy(self)
        mapping.object_types, mapping.module_names = dict(self.object_types), dict(self.module_names)
        mapping.module_name_regexes = dict(self.module_name_regexes)
        return mapping
