"""What users ask for of some products by name: other bits, or none at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ptq4vit_fx.errors import failure


@dataclass(frozen=True)
class Change:
    """What is changed of the products that a name or a pattern means (`names.is_meant`), whatever rule they follow.

    w, a: bits of weights and of activations, None as they are; both None: these products stay float.
    """

    pattern: str
    w: int | None = None
    a: int | None = None

    @property
    def leaves_float(self) -> bool:
        """Whether these products stay float."""
        return self.w is None and self.a is None

    @property
    def operation(self) -> str:
        """What is done, for a sentence: the Python argument and the option are called so."""
        return "skip" if self.leaves_float else "set bits"


def listed(names: str | Sequence[str]) -> list[str]:
    """Return one name, or some, as a list; raises PTQError on anything else."""
    found = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) and name for name in found):
        do = "write names such as 'blocks.0.mlp', or patterns"
        raise failure("QConfigMapping", "names", expected="names of products or modules", got=repr(names), do=do)
    return found
