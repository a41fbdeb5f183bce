"""The names of products, sites and what belongs to them: one grammar, written and read here alone.

| name | example | of what |
|---|---|---|
| product | `blocks.3.attn.matmul_av` | a product of the plan |
| site | `blocks.3.attn.matmul_av:lhs` | one operand of a product |
| branch | `blocks.3.attn.matmul_av:lhs_fine` | one range of a site with a twin: `fine` or `coarse` |
| head | `blocks.3.attn.matmul_qk:lhs_head` | the division by scales per head in front of a site |
| holder | `blocks.3.attn.matmul_av.lhs_fine` | the module of a converted graph with a scope's tensors |
| node | `blocks.3.attn.matmul_av:lhs_fine/QuantizeLinear` | a node of an ONNX file: its scope and its operator |
| tensor | `blocks.3.attn.matmul_av:lhs_fine.scale` | a constant of an ONNX file: its scope and its role |
| stored | `blocks.3.attn.matmul_av:lhs/fine_scale` | a tensor of a calibration file: its site and its role |
| part | `blocks.3.attn.qkv/MatMul_part0` | one of the products that a fused projection was split into |
| variant | `blocks.3.attn.matmul_av:rhs/DequantizeLinear_1` | a further node or tensor like another one |

A scope is what stands in front of the last `/` or `.`: a site, a branch, a head, a product or a module of the model.
What an integer product computes is named like a tensor, its scope the tensor that the product replaced: `matmul.codes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Literal

Operand = Literal["lhs", "rhs"]
OPERANDS: tuple[Operand, Operand] = ("lhs", "rhs")
Range = Literal["fine", "coarse"]
#: The ranges of a twin, in the order in which their products are summed.
RANGES: tuple[Range, Range] = ("fine", "coarse")
Role = Literal["codes", "scale", "zero_point", "low", "high", "clipped", "shape", "max", "min", "bound"]
#: What an integer product computes on its way (export/integer_products.py).
Stage = Literal["codes", "sum", "scales", "heads", "step", "columns", "shape", "images", "matrix"]

#: One operand of one product, such as `blocks.3.attn.matmul_qk:lhs`. Survives deepcopy and file formats.
Site = str

_OPERAND, _BRANCH, _MODULE, _NODE = ":", "_", ".", "/"
_HEAD, _PART = "_head", "_part"


def site(product: str, operand: Operand) -> Site:
    """Return the site of an operand."""
    return f"{product}{_OPERAND}{operand}"


def product_of(name: str) -> str:
    """Return the product of a site, a branch or a head; of a product, itself."""
    return name.partition(_OPERAND)[0]


def block_and_role(product: str) -> tuple[str, str]:
    """Return the block of a product and what it is there: ("blocks.3", "attn.qkv"); ("", itself) without a block.

    A block is a path that ends in a number, the last one with something behind it.
    """
    parts = product.split(_MODULE)
    numbers = [place for place, word in enumerate(parts[:-1]) if word.isdigit()]
    end = numbers[-1] + 1 if numbers else 0
    return _MODULE.join(parts[:end]), _MODULE.join(parts[end:])


def operand_of(name: str) -> Operand | None:
    """Return the operand of a site, a branch or a head, None for any other name."""
    operand = name.partition(_OPERAND)[2].partition(_BRANCH)[0]
    return operand if operand in OPERANDS else None


def branch(site: Site, part: Range | None) -> str:
    """Return the name of one range of a site with a twin; without a range, the site itself."""
    return site if part is None else f"{site}{_BRANCH}{part}"


def site_of(name: str) -> Site:
    """Return the site of a site, a branch or a head; of any other name, itself."""
    operand = operand_of(name)
    return name if operand is None else site(product_of(name), operand)


def range_of(name: str) -> Range | None:
    """Return the range of a branch, None for any other name."""
    rest = name.removeprefix(site_of(name)).removeprefix(_BRANCH)
    return rest if rest in RANGES else None


def head(scope: str) -> str:
    """Return the name of the division by scales per head in front of a site, or behind a product."""
    return f"{scope}{_HEAD}"


def is_head(scope: str) -> bool:
    """Return whether a scope, in either spelling, is a division by (or a multiplication with) scales per head."""
    return scope.endswith(_HEAD)


def holder(scope: str) -> str:
    """Return the path of the module in a converted graph that holds the tensors of a scope."""
    return scope.replace(_OPERAND, _MODULE)


def join(owner: str, leaf: str) -> str:
    """Return the path of an attribute, or the name of a tensor, in its owner ("" for the root)."""
    return f"{owner}{_MODULE}{leaf}" if owner else leaf


def owner_of(path: str) -> str:
    """Return the path of the module that has an attribute ("" for the root), or the scope of a tensor."""
    return path.rpartition(_MODULE)[0]


def leaf_of(path: str) -> str:
    """Return the last part of a dotted path: the attribute's own name, or the role of a tensor."""
    return path.rpartition(_MODULE)[2]


def is_inside(path: str, owner: str) -> bool:
    """Return whether a path is `owner` or lies in it."""
    return path == owner or path.startswith(f"{owner}{_MODULE}")


def owners(path: str) -> Iterator[str]:
    """Yield a path and those of the modules that it lies in, the innermost first."""
    while path:
        yield path
        path = owner_of(path)


def is_meant(path: str, pattern: str) -> bool:
    """Return whether a pattern is that of a path, or of a module that it lies in: a name, or with a shell's wildcards.

    `*` stands for any characters, dots too, `?` for one, `[0-3]` for one of some.
    """
    return any(path == pattern or fnmatchcase(path, pattern) for path in owners(path))


def with_owners(paths: Iterable[str]) -> list[str]:
    """Return some paths and those of all modules that they lie in, each once."""
    return list(dict.fromkeys(owner for path in paths for owner in owners(path)))


def identifier(name: str) -> str:
    """Return a name as torch.fx spells nodes and modules that it adds: letters, digits and underscores."""
    return name.replace(_MODULE, "_").replace(_OPERAND, "_")


def node(scope: str, operator: str, number: int = 0) -> str:
    """Return the name of an ONNX node; a number tells nodes with the same scope and operator apart."""
    base = f"{scope}{_NODE}{operator}" if scope else operator
    return f"{base}_{number}" if number else base


def scope_of(node_name: str) -> str:
    """Return the scope of an ONNX node, "" if it has none."""
    return node_name.rpartition(_NODE)[0]


def path_of(name: str) -> str:
    """Return the module or scope that a node's name starts with, also where a runtime appended more to the name."""
    return name.partition(_NODE)[0]


def is_derived(name: str, node_name: str) -> bool:
    """Return whether a runtime's name is that of a node, or one that it made of it: `<node>/...`."""
    return name == node_name or name.startswith(f"{node_name}{_NODE}")


def beside(node_name: str, operator: str, other: str) -> str:
    """Return the name of a node beside another: the same scope and number, the other operator in place of its own.

    A node that is not named after its operator gets the other one behind its name.
    """
    scope, slash, last = node_name.rpartition(_NODE)
    named = operator in last
    return f"{scope}{slash}{last.replace(operator, other, 1)}" if named else f"{node_name}{_NODE}{other}"


def variant(name: str, mark: int | str) -> str:
    """Return the name of a further node or tensor like the one with this name, told apart by a number or a word."""
    return f"{name}{_BRANCH}{mark}"


def tensor(scope: str, role: Role | Stage, number: int = 0) -> str:
    """Return the name of a tensor of an ONNX file; a number tells those with the same scope and role apart."""
    return join(scope, f"{role}{number}" if number else role)


def head_scale(site: Site) -> str:
    """Return the name of the constant with the scales per head of a site."""
    return tensor(holder(head(site)), "scale")


def is_head_scale(name: str) -> bool:
    """Return whether a name is that of a constant with scales per head."""
    return leaf_of(name) == "scale" and is_head(owner_of(name))


def stored(site: Site, role: str) -> str:
    """Return the name of a tensor in a calibration file."""
    return f"{site}{_NODE}{role}"


def site_and_role(name: str) -> tuple[Site, str]:
    """Return the site and the role of a tensor in a calibration file."""
    site, _, role = name.rpartition(_NODE)
    return site, role


def part(name: str, number: int) -> str:
    """Return the name of what belongs to one part of a fused projection."""
    return f"{name}{_PART}{number}"


def is_part(name: str) -> bool:
    """Return whether a name is that of a part of a fused projection."""
    before, found, number = name.rpartition(_PART)
    return bool(before and found) and number.isdigit()
