"""One grammar of names: what is written is read back, and nobody but its module slices a name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq4vit_fx import names

ROOT = Path(__file__).resolve().parents[1]
PATHS = st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True), min_size=1, max_size=4).map(".".join)
OPERANDS, RANGES = st.sampled_from(names.OPERANDS), st.sampled_from([None, *names.RANGES])


@given(PATHS, OPERANDS, RANGES)
def test_sites_and_branches_are_read_back(product, operand, part):
    site = names.site(product, operand)
    branch = names.branch(site, part)
    for name in (site, branch, names.head(site)):
        assert names.product_of(name) == product
        assert names.operand_of(name) == operand
        assert names.site_of(name) == site
    assert names.range_of(branch) == part
    assert names.range_of(names.head(site)) is None
    assert names.is_head(names.head(site))
    assert names.operand_of(product) is None
    assert names.site_of(product) == product


@given(PATHS, OPERANDS, st.integers(0, 3))
def test_nodes_and_tensors_are_read_back(product, operand, number):
    site = names.site(product, operand)
    assert names.scope_of(names.node(site, "QuantizeLinear", number)) == site
    assert names.scope_of(names.node("", "Add", number)) == ""
    tensor = names.tensor(site, "zero_point")
    assert (names.owner_of(tensor), names.leaf_of(tensor)) == (site, "zero_point")
    part = names.part(names.node(product, "MatMul"), number)
    assert names.is_part(part)
    assert not names.is_part(product + "_part")


@given(PATHS, PATHS)
def test_a_path_is_inside_of_itself_and_of_its_owners_alone(owner, leaf):
    assert names.is_inside(owner, owner)
    assert names.is_inside(names.join(owner, leaf), owner)
    assert not names.is_inside(f"{owner}x", owner)
    assert names.join("", leaf) == leaf


SLICERS = {"partition", "rpartition", "split", "rsplit", "removesuffix", "removeprefix", "endswith", "startswith"}
#: What separates or ends the names of the grammar.
GRAMMAR = {":", "/", "_fine", "_coarse", "_head", "_part", ".scale", ".codes", ".zero_point", "fine", "coarse"}
#: Not names of this project.
OTHERS = {
    "export/proof/instructions.py": "lines of /proc/cpuinfo",
    "ptq4vit_fx/data/archives.py": "paths inside of archives",
    "ptq4vit_fx/data/sources.py": "FILE:NAME of an array or a column",
    "ptq4vit_fx/tools/config_file.py": "--ema/--no-ema, both spellings of a switch",
    "ptq4vit_fx/tools/named/from_python.py": "file.py:Class",
    "ptq4vit_fx/tools/named/from_torchvision.py": "torchvision:NAME",
    "ptq4vit_fx/tools/named/kinds.py": "names of models by their kind",
}
SOURCES = [path for room in ("passes", "export", "ptq4vit_fx") for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_else_slices_a_name(path):
    relative = str(path.relative_to(ROOT))
    if relative in OTHERS or relative == "ptq4vit_fx/names.py":
        return
    found = [
        f"line {call.lineno}: {call.func.attr}({argument.value!r})"
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in SLICERS
        for argument in call.args
        if isinstance(argument, ast.Constant) and argument.value in GRAMMAR
    ]
    assert not found
