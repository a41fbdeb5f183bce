"""Small models and graphs for the tests of passes, and a graph as text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.contract import history
from ptq4vit_fx.passes.graph.shapes import is_tensor, shape_of

#: A search that takes no time, for tests that do not ask how good scales are.
QUICK = {"n": 2, "rounds": 1, "screen_rows": 16, "confirm": 1, "max_shift": 3}


class Call(nn.Module):
    """A function of the input, and modules that it may use."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def model_of(function: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> nn.Module:
    torch.manual_seed(0)
    return Call(function, **modules).eval()


def count(graph_module: GraphModule) -> int:
    """Return how many places the last pass rewrote."""
    return history(graph_module)[-1].count


def calibrated(model: nn.Module, images: Tensor, mapping: ptq.QConfigMapping | None = None, **loss: Any) -> GraphModule:
    """Return the model prepared on its first image, with scales of a search that takes no time."""
    prepared = ptq.prepare_fx(model, (mapping or ptq.recipes.ptq4vit()).with_search(**QUICK), images[:1])
    ptq.calibrate(prepared, images, progress=False, **loss)
    return prepared


class Block(nn.Module):
    """A block of a vision transformer, written out, so that no library decides how its graph looks."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.drop(self.proj(attended))
        return x + self.drop(self.fc2(self.act(self.fc1(self.norm2(x)))))


class TwoBlocks(nn.Module):
    """The smallest vision transformer: patches, a class token, two blocks, a head on the class token."""

    def __init__(self, dim: int = 8, heads: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.blocks = nn.Sequential(Block(dim, heads), Block(dim, heads))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def two_blocks() -> nn.Module:
    torch.manual_seed(0)
    return TwoBlocks().eval()


def text_of(graph_module: GraphModule) -> str:
    """Return a graph as text, a node a line: name, shape, call. Numbers in names are counted anew, in order."""
    names: dict[Node, str] = {}
    taken: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        base = re.sub(r"(_\d+)+$", "", node.name)
        names[node] = f"{base}_{taken[base]}" if taken[base] else base
        taken[base] += 1
    return "".join(f"{_line(node, names)}\n" for node in graph_module.graph.nodes)


def _line(node: Node, names: dict[Node, str]) -> str:
    shape = (" x ".join(map(str, shape_of(node))) or "scalar") if is_tensor(node) else ""
    if node.op in ("placeholder", "get_attr"):
        call = f"{node.op} {node.target}"
    else:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        given = [*((None, value) for value in node.args), *node.kwargs.items()]
        arguments = [f"{key}={_text(value, names)}" if key else _text(value, names) for key, value in given]
        call = f"{target}({', '.join(arguments)})"
    return f"{names[node]:32} {shape:14} {call}".rstrip()


def _text(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_text(item, names) for item in value)})"
    if isinstance(value, Node):
        return names[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)
