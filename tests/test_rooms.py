"""Who may import whom: the rooms of ARCHITECTURE.md, directly and through others."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAME = "ptq4vit_fx"
FILES = {
    ".".join((NAME, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for folder in (ROOT, ROOT / NAME)
    for part in (("passes", "export") if folder == ROOT else (".",))
    for path in sorted((folder / part).rglob("*.py"))
}
#: The API puts the rooms together; twins and the front door stand on it.
HALL = {NAME, f"{NAME}.api", f"{NAME}.pipeline", f"{NAME}.twins"}
#: What `python -m` starts is a part of the command line.
DOOR = f"{NAME}.__main__"
ROOMS = {room: f"{NAME}.{room}" for room in ("search", "calibrating", "tools", "passes", "export", "tuning")}
#: Room -> the rooms that it reaches neither itself nor through what it imports.
NEVER = {
    "values": ("search", "calibrating", "tools", "passes", "export", "tuning"),
    "search": ("calibrating", "tools", "passes", "export", "tuning"),
    "passes": ("search", "calibrating", "tools", "export", "tuning"),
    "export": ("search", "calibrating", "tools", "tuning"),
    "calibrating": ("tools", "export", "tuning"),
    "tuning": ("tools",),
    "hall": ("tools",),
}


def room_of(module: str) -> str:
    inside = (room for room, path in ROOMS.items() if module == path or module.startswith(f"{path}."))
    return "tools" if module == DOOR else next(inside, "hall" if module in HALL else "values")


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of this project that a module imports when it is imported, or inside of a function."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    checked = {n for node in ast.walk(tree) if isinstance(node, ast.If) for n in ast.walk(node) if _type_checking(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in checked and (node.module or "").startswith(NAME):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import) and node not in checked:
            found |= {alias.name for alias in node.names}
    return frozenset(name for name in found if name in FILES) - {NAME}


def _type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def reached(module: str) -> set[str]:
    seen, queue = {module}, [module]
    while queue:
        new = imports(queue.pop()) - seen
        seen |= new
        queue += new
    return seen


@pytest.mark.parametrize("room", NEVER)
def test_rooms_import_what_they_may(room):
    members = [module for module in FILES if room_of(module) == room]
    assert members
    broken = {f"{m} -> {other}" for m in members for other in reached(m) if room_of(other) in NEVER[room]}
    assert not broken


def test_the_hall_is_small():
    assert len(list((ROOT / NAME).glob("*.py"))) <= 17
