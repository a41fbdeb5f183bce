"""`ptq4vit quantize --plan`: what would be done, of a model that is prepared and images that are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ptq4vit_fx.api import prepare_fx
from ptq4vit_fx.calibrating.memory import MemoryBudget, default_memory_limit
from ptq4vit_fx.errors import printable, some_names
from ptq4vit_fx.names import OPERANDS, site
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.shapes import MULTIPLIES
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import describe_quantizer
from ptq4vit_fx.tools.devices import check_device
from ptq4vit_fx.tools.mappings import said_of
from ptq4vit_fx.tools.request import Request
from ptq4vit_fx.tools.summary import wrapped

if TYPE_CHECKING:
    from ptq4vit_fx.tools.quantizing import Source


@dataclass(frozen=True)
class Group:
    """Products that are quantized alike, by one name where all of that name are: `blocks.*.mlp.fc1`."""

    name: str
    products: tuple[str, ...]
    kind: str
    lhs: str
    rhs: str


@dataclass(frozen=True)
class Noted:
    """What stays float, or what a transform does or leaves: the same reason or note for all of these names."""

    what: str
    names: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Memory:
    """Bytes that calibration may take, bytes of all operands and gradients, and the passes over the images."""

    limit: int
    captured: int
    passes: int


@dataclass(frozen=True)
class Planned:
    """What a run of `ptq4vit quantize` would do. parameters: how many numbers. multiplications: of one image, of those
    the integer ones. images: of the calibration and of the comparison; why_seen: why those are the same, "" if they are
    not; skipped: files that cannot be read. said: what each setting matches. done, left: transforms, and those that do
    not apply; they and float_ops are grouped by their reason.
    """

    model: str
    parameters: int
    preprocessing: dict[str, Any]
    images: tuple[int, int]
    why_seen: str
    skipped: tuple[str, ...]
    recipe: str
    device: str
    target: str
    opset: int
    multiplications: tuple[int, int]
    memory: Memory
    groups: tuple[Group, ...]
    float_ops: tuple[Noted, ...]
    done: tuple[Noted, ...]
    left: tuple[Noted, ...]
    files: tuple[str, ...]
    said: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return it as text, of the columns that the end of a run has, but for long names."""
        memory, (calibrated, compared) = self.memory, self.images
        size = " x ".join(map(str, self.preprocessing["input_size"]))
        mean, std = (" ".join(f"{x:g}" for x in self.preprocessing[key]) for key in ("mean", "std"))
        seen = f"of its own: {self.why_seen}" if self.why_seen else "others"
        skipped = f", {len(self.skipped)} skipped" * bool(self.skipped)
        all_of_them, integer = self.multiplications
        passes = f"in {memory.passes} pass{'es' * (memory.passes != 1)} over the images"
        rows = [
            ("model", f"{self.model}, {self.parameters / 1e6:.2f} M parameters"),
            ("images", f"{size}, {self.preprocessing['interpolation']}, mean {mean}, std {std}"),
            ("", f"{calibrated} for calibration{skipped}; compared with float on {compared} {seen}"),
            ("recipe", f"{self.recipe}, calibrated on {self.device}"),
            ("memory", f"operands and gradients {_mib(memory.captured)}, {passes}; limit {_mib(memory.limit)}"),
            (
                "quantized",
                f"{sum(len(group.products) for group in self.groups)} products, "
                f"{integer / max(1, all_of_them):.1%} of {all_of_them / 1e6:,.1f} M multiplications an image",
            ),
        ]
        lines = [line for word, text in rows for line in wrapped(word, text)]
        lines += self._table()
        notes = [("float", op) for op in self.float_ops] or [("float", Noted("", (), "no product"))]
        notes += [("transforms", place) for place in self.done] + [("left out", place) for place in self.left]
        for word, place in notes:
            named = f"{place.what + ', ' if place.what else ''}{some_names(place.names)}: " if place.names else ""
            lines += wrapped(word, f"{named}{place.note}")
        lines += [line for said in self.said for line in wrapped("settings", said)]
        lines += [line for file in self.files for line in wrapped("writes", file)]
        return [printable(line) for line in lines]

    def _table(self) -> list[str]:
        rows = [("", "product", "lhs", "rhs")]
        rows += [(f"{len(g.products):>4}", g.name, g.lhs, g.rhs) for g in self.groups]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]


def planned(request: Request, source: Source) -> Planned:
    """Return what would be done with a model and images that were read; nothing is calibrated or written.

    Raises PTQError on what the run would refuse.
    """
    prepared = prepare_fx(source.network, request.mapping, source.pixels[:1], skip=request.skip)
    request.destination.check_names(prepared)
    plan, device, images = plan_of(prepared), check_device(request.device), len(source.pixels)
    return Planned(
        model=request.model,
        parameters=sum(parameter.numel() for parameter in source.network.parameters()),
        preprocessing=source.preprocessing,
        images=(images, len(source.compared.pixels)),
        why_seen=source.compared.reason,
        skipped=source.skipped,
        recipe=plan.recipe,
        device=device,
        target=request.target,
        opset=request.opset,
        multiplications=_multiplications(prepared),
        memory=_memory(prepared, request, images, torch.device(device)),
        groups=_groups(plan),
        float_ops=_noted(("", op.name, op.reason) for op in plan.float_ops),
        done=_noted((p.transform, p.name, p.note) for p in plan.transformed if p.done),
        left=_noted((p.transform, p.name, p.note) for p in plan.transformed if not p.done),
        files=_files(request),
        said=tuple(said_of(request.settings, request.skip, plan)),
    )


def _multiplications(prepared: GraphModule) -> tuple[int, int]:
    counted = [(node.meta.get(MULTIPLIES) or 0, "ptq4vit_op" in node.meta) for node in prepared.graph.nodes]
    return sum(count for count, _ in counted), sum(count for count, planned in counted if planned)


def _memory(prepared: GraphModule, request: Request, images: int, device: torch.device) -> Memory:
    """Return what calibration takes, counted as it counts; raises PTQError if the limit does not hold a product."""
    chosen = request.memory_limit is not None
    limit = round(request.memory_limit * 2**30) if request.memory_limit is not None else default_memory_limit(device)
    budget, ops = MemoryBudget.of(prepared, limit, chosen=chosen), plan_of(prepared).ops
    passes = len(ops) if request.sequential else len(budget.groups(ops, images))
    return Memory(limit, images * sum(budget.captured.values()), passes)


def _groups(plan: QuantPlan) -> tuple[Group, ...]:
    """Return the products in groups, in the order of each one's first."""
    same: dict[tuple[str, ...], list[str]] = {}
    for op in plan.ops:
        described = [describe_quantizer(plan.quantizers[site(op.name, operand)]) for operand in OPERANDS]
        same.setdefault((_pattern(op.name), op.kind, *described), []).append(op.name)
    patterns = [pattern for pattern, *_ in same]
    return tuple(
        Group(pattern if patterns.count(pattern) == 1 and len(names) > 1 else some_names(names, 1), tuple(names), *how)
        for (pattern, *how), names in same.items()
    )


def _pattern(name: str) -> str:
    """Return a name with a star in the place of the numbers of its modules."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


def _noted(places: Iterable[tuple[str, str, str]]) -> tuple[Noted, ...]:
    same: dict[tuple[str, str], list[str]] = {}
    for what, name, note in places:
        same.setdefault((what, note), []).append(name)
    return tuple(Noted(what, tuple(names), note) for (what, note), names in same.items())


def _files(request: Request) -> tuple[str, ...]:
    """Return what would be written, in the order of writing."""
    destination = request.destination
    what = f"the quantized model, opset {request.opset}, target {request.target}"
    paths = {"finished products": request.checkpoint, what: destination.out, "the float model": request.float_onnx}
    paths["the report"] = request.report
    return tuple(f"{path} ({what})" for what, path in paths.items() if path is not None)


def _mib(size: float) -> str:
    return f"{math.ceil(size / 2**20)} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
