"""The rules of a mapping as rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq4vit_fx.qconfig import QConfig, QConfigMapping

#: What a rule gives a quantizer of, as in `QConfig`.
OPERANDS = ("activation", "weight", "matmul", "softmax", "gelu", "convolved", "kernel", "image")


def rules_of(mapping: QConfigMapping) -> list[dict[str, Any]]:
    """Return a dictionary per rule, lowest precedence first, then the changes; without quantizers: it leaves float."""
    from ptq4vit_fx.qconfig import OBJECT_KINDS

    rules: list[tuple[str, str, QConfig | None]] = []
    if mapping.global_qconfig is not None:
        rules.append(("global", "", mapping.global_qconfig))
    rules += [("object type", OBJECT_KINDS[key], own) for key, own in mapping.object_types.items()]
    rules += [("module name pattern", key, own) for key, own in mapping.module_name_regexes.items()]
    rules += [("module name", key, own) for key, own in mapping.module_names.items()]
    for change in mapping.changes:
        bits = "".join(f"{side}{own}" for side, own in (("w", change.w), ("a", change.a)) if own is not None)
        rules.append((f"bits {bits}" if bits else "skip", change.pattern, None))
    return [{"rule": rule, "key": key} | {name: _described(own, name) for name in OPERANDS} for rule, key, own in rules]


def _described(qconfig: QConfig | None, operand: str) -> str | None:
    quantizer = getattr(qconfig, operand, None)
    return None if quantizer is None else str(quantizer.describe())
