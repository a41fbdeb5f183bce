"""Names that a traced graph cannot have: what Python or a GraphModule means by them gets an underscore behind it."""

from __future__ import annotations

import functools
import keyword
import re
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from ptq4vit_fx.passes.graph.marks import SCOPES
from ptq4vit_fx.passes.graph.traced_module import TracedModule

#: Where a GraphModule keeps path in the model -> path in the graph, of what was renamed.
RENAMED = "ptq4vit_renamed"
#: What this package holds in a GraphModule, and what torch.export takes for its own root.
ATTACHED = frozenset({"plan", "calibration", "_export_root"})
#: In a string of the code that torch.fx writes, or between a product and its operand (ptq4vit_fx/names.py).
_NO_PART_OF_A_NAME = re.compile(r'[:"\\\s]')


def traced_module(root: nn.Module, graph: Graph, name: str) -> GraphModule:
    """Return the module of a graph over a root, a copy that is held by nobody else.

    Everything that the graph reads has a name that a GraphModule can have: code that says `self.heads.class` is none,
    `self.graph` is another thing, and `a:lhs` is a site. What was renamed is in the meta of the module.
    """
    renamed = _spell_names(root, graph)
    module = TracedModule(root, graph, class_name=name)
    module.meta[RENAMED] = renamed
    return module


def _spell_names(root: nn.Module, graph: Graph) -> dict[str, str]:
    """Let a graph read everything under possible names; return path in the model -> another one in the graph.

    The root holds what the graph reads under both names.
    """
    spelling = _Spelling(root)
    entries = (*root.named_modules(), *root.named_parameters(), *root.named_buffers())
    if not any(_is_impossible(part, depth) for path, _ in entries for depth, part in enumerate(path.split("."))):
        return {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = spelling.of(str(node.target))
        scopes = node.meta.get(SCOPES, {})
        node.meta[SCOPES] = {key: (spelling.of(path), kind) for key, (path, kind) in scopes.items()}
    return {path: spelled for path, spelled in spelling.known.items() if path != spelled}


@functools.cache
def _taken() -> frozenset[str]:
    return ATTACHED | frozenset(dir(TracedModule(nn.Module(), Graph())))


def _is_impossible(name: str, depth: int) -> bool:
    taken = depth == 0 and name in _taken()
    return taken or keyword.iskeyword(name) or _NO_PART_OF_A_NAME.search(name) is not None


class _Spelling:
    """The paths of a root as a graph spells them; what is asked for is held under its new name too."""

    def __init__(self, root: nn.Module) -> None:
        self._root, self._names = root, dict[tuple[int, str], str]()
        self.known = {"": ""}

    def of(self, path: str) -> str:
        if path not in self.known:
            owner: Any = self._root
            parts = []
            for depth, name in enumerate(path.split(".")):
                parts.append(self._name(owner, name, depth))
                owner = getattr(owner, name, None)
            self.known[path] = ".".join(parts)
        return self.known[path]

    def _name(self, owner: Any, name: str, depth: int) -> str:
        if not _is_impossible(name, depth):
            return name
        if (id(owner), name) not in self._names:
            spelled = f"{_NO_PART_OF_A_NAME.sub('_', name)}_"
            while hasattr(owner, spelled) or _is_impossible(spelled, depth):
                spelled += "_"
            _hold(owner, spelled, getattr(owner, name, None))
            self._names[id(owner), name] = spelled
        return self._names[id(owner), name]


def _hold(owner: Any, name: str, value: Any) -> None:
    """Let a module hold a module, a parameter or a buffer under one more name."""
    if isinstance(owner, nn.Module) and isinstance(value, nn.Module | nn.Parameter):
        setattr(owner, name, value)
    elif isinstance(owner, nn.Module) and isinstance(value, Tensor):
        owner.register_buffer(name, value)
