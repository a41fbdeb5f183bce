"""How much memory calibration takes, and how to stay under a limit: capture fewer ops or fewer images at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure, some_names, warn
from ptq4vit_fx.inputs.batches import FIXED_BATCH
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.shapes import shape_of
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.torch_state import intra_op_threads

#: So many products are searched at the same time on a GPU, where most of the time goes into calls.
GPU_SEARCHES = 2

#: Share of the limit that is planned with. The rest is for what the allocator keeps: ViT-L/16 planned with all of 8 GiB
#: peaked at 8.4, planned with 0.8 of them at 7.8 (docs/calibration.md).
PLANNED_SHARE = 0.8

#: Bytes of the limit that are not planned with: steps of two searches, kernels' buffers, and pieces that the allocator
#: keeps took 120 to 190 MiB of models of 64 pixels, however little of them was captured at a time
#: (examples/bench_limits.py memory).
RESERVED = 150 << 20

#: Searching a weight takes about this many times the bytes of the weight and of the Gram matrix of its inputs.
WEIGHT_FACTOR = 2.6

#: Rounding a weight by that Gram matrix takes about so many times its bytes, and so many times those of the matrix: the
#: matrix in order, its factor, the inverse of that (4,096 x 64: 5.2; 1,024 x 4,096: 8.3 of the weight).
ROUNDING_FACTORS = (8.5, 5.5)

#: Searching an op takes about this many times the bytes that were captured for it: the batches put together, the
#: float output, the quantized operand that is held fixed, the distances of a chunk.
SEARCH_FACTOR = 2.5

#: Forward and backward of an image take about this many times the bytes of all values in the graph.
BACKWARD_FACTOR = 1.5

#: Share of the limit that forward and backward of one batch may take.
BACKWARD_SHARE = 0.3

#: Share of the limit that searches beside each other may take.
SEARCH_SHARE = 0.5


def default_memory_limit(device: torch.device) -> int:
    """Return half of the memory that is free on the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return psutil.virtual_memory().available // 2


def searches_at_once(device: torch.device) -> int:
    """Return how many products are searched at the same time on a device, where memory allows it."""
    return intra_op_threads() if device.type == "cpu" else GPU_SEARCHES


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that calibration may take beside the model, and what an image costs.

    limit: the part of memory_limit that is planned with. captured: op name -> bytes per image of operands and gradient.
    weights: op name -> bytes that searching and rounding its weight takes.
    backward: bytes per image of a forward and backward. at_once: images that a forward takes at least. chosen: whether
    the user set the limit, which then holds.
    """

    limit: int
    captured: dict[str, int]
    weights: dict[str, float]
    backward: int
    at_once: int
    chosen: bool

    @staticmethod
    def of(prepared: GraphModule, limit: int, *, chosen: bool = True) -> MemoryBudget:
        """Return the budget of a prepared model, from the shapes recorded on its example."""
        plan, captured = plan_of(prepared), dict[str, int]()
        weights: dict[str, float] = {}
        total = 0
        images = max(1, int(prepared.meta["ptq4vit_example_batch"]))
        for node in prepared.graph.nodes:
            if "tensor_meta" not in node.meta or node.op == "get_attr":
                continue
            total += _bytes(node)
            name = node.meta.get("ptq4vit_op")
            if name is not None and node.op == "call_function":
                tensors = [node, node.args[0]] + ([] if node.args[1].op == "get_attr" else [node.args[1]])
                captured[name] = sum(_bytes(tensor) for tensor in tensors) // images
                weights[name] = max(WEIGHT_FACTOR * _weight_search(node.args[1]), _rounding(plan, name, node.args[1]))
        at_once = prepared.meta.get(FIXED_BATCH) or 1
        backward = round(BACKWARD_FACTOR * total / images)
        planned = round(PLANNED_SHARE * max(0, limit - RESERVED))
        return MemoryBudget(planned, captured, weights, backward, at_once, chosen)

    def split(self, batches: Sequence[Inputs]) -> list[Inputs]:
        """Return the batches, cut so that forward and backward of one take their share of the limit at most."""
        least = self.at_once * self.backward
        size = self.at_once * max(1, int(BACKWARD_SHARE * self.limit / max(1, least)))
        if least > BACKWARD_SHARE * self.limit:
            what = "one image" if self.at_once == 1 else f"{self.at_once} images, which the model takes at once,"
            self._does_not_hold(f"forward and backward of {what}", least, least / BACKWARD_SHARE)
        return [part for batch in batches for part in zip(*(torch.split(x, size) for x in batch), strict=True)]

    def searches(self, ops: Sequence[QuantOp], images: int, threads: int) -> int:
        """Return how many products may be searched at the same time, at most `threads`, at least one."""
        largest = max((self._search(op, images) for op in ops), default=0.0)
        return max(1, min(threads, int(SEARCH_SHARE * self.limit / max(1.0, largest))))

    def _search(self, op: QuantOp, images: int) -> float:
        return SEARCH_FACTOR * images * self.captured.get(op.name, 0) + self.weights.get(op.name, 0.0)

    def groups(self, ops: Sequence[QuantOp], images: int, searches: int = 1) -> list[list[QuantOp]]:
        """Split the ops, in order, into groups whose capture and searches fit into the limit; at least one op each."""
        groups: list[list[QuantOp]] = []
        held, too_large = 0.0, {}
        largest = max((self._search(op, images) for op in ops), default=0.0)
        for op in ops:
            need = self.captured.get(op.name, 0) * images
            searching = self._search(op, images) if searches == 1 else searches * largest
            room = self.limit - max(searching, BACKWARD_SHARE * self.limit)
            if need > room:
                too_large[op.name] = need + self._search(op, images)
            if not groups or held + need > room:
                groups.append([])
                held = 0.0
            groups[-1].append(op)
            held += need
        if too_large:
            most = max(too_large.values())
            self._does_not_hold(some_names(too_large), most, most)
        return groups

    def _does_not_hold(self, what: str, need: float, least: float) -> None:
        """Say that `what` takes more than the limit allows; least: bytes that must be planned with."""
        limit, least = (size / PLANNED_SHARE + RESERVED for size in (self.limit, least))
        text = f"{what} takes about {_mib(need)}"
        if self.chosen:
            do = f"raise it to {_mib(least)} or more, or use fewer or smaller images"
            raise failure("calibrate", "memory_limit", expected=f"{_mib(least)}, as {text}", got=_mib(limit), do=do)
        message = f"calibrate: {text}, half of the free memory is {_mib(limit)}: more will be taken; use fewer images"
        warn(message)


def _mib(size: float) -> str:
    return f"{math.ceil(size / 2**20):,} MiB"


def _weight_search(rhs: torch.fx.Node) -> int:
    """Return the bytes of a weight (columns, inner) and of the Gram matrix (inner, inner), 0 of what is no weight."""
    shape = getattr(rhs.meta.get("tensor_meta"), "shape", None)
    if rhs.op != "get_attr" or not shape:
        return 0
    inner = int(shape.numel()) // int(shape[0])
    return 4 * inner * (int(shape[0]) + inner)


def _rounding(plan: QuantPlan, name: str, rhs: torch.fx.Node) -> float:
    """Return the bytes that rounding the weight of a product takes, 0 where each value gets its nearest code."""
    op = next((op for op in plan.ops if op.name == name), None)
    if op is None or not op.rhs_is_weight or plan.searches[name].rounding == "nearest":
        return 0.0
    shape = shape_of(rhs)
    inner = shape[0] if op.kind == "matmul" else math.prod(shape[1:])
    of_weight, of_square = ROUNDING_FACTORS
    return 4 * (of_weight * math.prod(shape) + of_square * op.groups * inner * inner)


def _bytes(node: torch.fx.Node) -> int:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return 0 if shape is None else 4 * int(shape.numel())
