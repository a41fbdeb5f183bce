"""Where something happens, as its user knows it: the module of the model, and the line of the forward."""

from __future__ import annotations

import linecache
import os
import re
import sys
import types
from collections.abc import Iterable
from itertools import takewhile

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from ptq4vit_fx.passes.graph.marks import scope_of, stack_of

#: Directories whose frames are not the user's: torch's and that of the passes, which call his model.
NOT_OURS = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, os.path.join(__file__, "..", ".."))
)
#: The file of what calls a model while it is traced or measured.
CALLER = os.path.join(os.path.dirname(__file__), "model_call.py")
#: Where torch.vmap and what is like it run a function of the user's.
TRANSFORMS = tuple(
    os.path.join(NOT_OURS[0], "_functorch", name) for name in ("apis.py", "vmap.py", "eager_transforms.py")
)

Frames = Iterable[tuple[types.FrameType, int]]


def frames_of(error: BaseException) -> Frames:
    """Return the frames of an exception, the innermost first."""
    found, entry = [], error.__traceback__
    while entry is not None:
        found.append((entry.tb_frame, entry.tb_lineno))
        entry = entry.tb_next
    return reversed(found)


def frames_here() -> Frames:
    """Return the frames of the forward that is running, the innermost first.

    Of a function that torch.vmap or the like runs, it is the call of that.
    """
    frame: types.FrameType | None = sys._getframe(1)
    found = []
    while frame and frame.f_code.co_filename != CALLER:
        found.append((frame, frame.f_lineno))
        frame = frame.f_back
    transforms = [i for i, (frame, _) in enumerate(found) if frame.f_code.co_filename.startswith(TRANSFORMS)]
    return found[transforms[-1] + 1 :] if transforms else found


def place_of(frames: Frames, model: nn.Module) -> str:
    """Return `module 'blocks.0.attn' (Attention), file:line: source` of the innermost frame that is the user's."""
    paths = {id(module): name for name, module in model.named_modules()}
    frames, module = list(frames), f"module '(root)' ({type(model).__name__})"
    for frame, _ in frames:
        owner = frame.f_locals.get("self")
        if id(owner) in paths:
            module = f"module {paths[id(owner)] or '(root)'!r} ({type(owner).__name__})"
            break
    return ", ".join(part for part in (module, line_in(frames)) if part)


def line_in(frames: Frames) -> str:
    """Return `file:line: source` of the innermost frame that is the user's, "" if there is none."""
    for frame, number in frames:
        file = frame.f_code.co_filename
        if not file.startswith(NOT_OURS) and not file.startswith("<"):
            return f"{file}:{number}: `{linecache.getline(file, number).strip()}`"
    return ""


def node_at(frames: Frames, graph_module: GraphModule) -> Node | None:
    """Return the node of a graph that these frames compute: by the line of its own code, or by an interpreter."""
    code: types.CodeType = type(graph_module).forward.__code__
    nodes: list[Node] = list(graph_module.graph.nodes)
    numbers: dict[int, int | None] = graph_module._lineno_map or {}
    for frame, number in frames:
        index = numbers.get(number - code.co_firstlineno) if frame.f_code is code else None
        if index is not None:
            return nodes[index]
        node = frame.f_locals.get("n") if frame.f_code is Interpreter.run_node.__code__ else None
        if isinstance(node, Node) and node in nodes:
            return node
    return None


def place_in(graph_module: GraphModule, error: BaseException) -> str:
    """Return where a graph raised this: the module of its node, and the line, that of a closed module if it is one."""
    code, frames = type(graph_module).forward.__code__, list(frames_of(error))
    node = node_at(frames, graph_module)
    inside = takewhile(lambda entry: entry[0].f_code is not code, frames)
    return place_of_node(node, line_in(inside)) if node else type(graph_module).__name__


def place_of_node(node: Node, line: str = "") -> str:
    """Return `module 'blocks.0.attn', file:line: source` of the call that became a node, as far as it is known."""
    scope = scope_of(node)
    part = f"module {scope!r}" if scope else "the model's own forward"
    return f"{part}, {line or line_of(node) or node.name}"


def line_of(node: Node) -> str:
    """Return `file:line: source` of the model's line that made a node, "" if the tracer did not note it."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', stack_of(node))
    theirs = [frame for frame in frames if not frame[0].startswith((*NOT_OURS, "<"))]
    return "{}:{}: `{}`".format(*theirs[-1]) if theirs else ""
