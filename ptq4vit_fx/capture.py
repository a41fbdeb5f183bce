"""Capture: one forward and one backward per batch give every product's operands and the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure
from ptq4vit_fx.observer import ProductObserver
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.products import Product, to_product

Loss = Callable[[Any], Tensor]


@dataclass
class Captured:
    """What one product read and wrote, a tensor per batch; a weight or bias is kept once."""

    lhs: list[Tensor] = field(default_factory=list)
    rhs: list[Tensor] = field(default_factory=list)
    gradient: list[Tensor] = field(default_factory=list)
    bias: Tensor | None = None


def pseudo_label_loss(logits: Any) -> Tensor:
    """Return sum CE(logits, argmax logits): the float model's own prediction is the label (PTQ4ViT, section 3.3).

    logits: (batch, classes), at least two classes. In float64, because 1 - p of a certain model vanishes in
    float32. Raises PTQError on any other output.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise failure(
            "calibrate",
            "the model's output",
            expected="logits, a tensor (batch, classes) with two classes or more",
            got=str(got),
            do="pass loss=, a function from the output to a scalar",
        )
    logits = logits.double()
    return F.cross_entropy(logits, logits.argmax(-1), reduction="sum")


def capture(
    prepared: GraphModule,
    ops: Sequence[QuantOp],
    batches: Iterable[Tensor],
    *,
    loss: Loss,
    with_gradient: bool,
) -> dict[str, Captured]:
    """Run the observed model on every batch and return what the observers of `ops` saw, float32.

    Only gradients of activations are computed: no parameter and no image requires one.
    """
    captured = {op.name: Captured() for op in ops}
    weights = {op.name for op in ops if op.rhs_is_weight}

    def record(name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        seen = captured[name]
        if name not in weights and out.ndim > 2:  # broadcast operands are stored once per image, like the others
            lhs = lhs.expand(*out.shape[:-2], *lhs.shape[-2:])
            rhs = rhs.expand(*out.shape[:-2], *rhs.shape[-2:])
        seen.lhs.append(lhs.detach())
        if name not in weights or not seen.rhs:
            seen.rhs.append(rhs.detach())
        seen.bias = None if bias is None else bias.detach()
        if with_gradient:
            if not out.requires_grad:  # nothing before this product is differentiated: start here
                out = out.detach().requires_grad_(True)
            out.register_hook(seen.gradient.append)  # type: ignore[no-untyped-call]
        return out

    with recording(prepared, captured, record):
        for batch in batches:
            with torch.set_grad_enabled(with_gradient):
                output = prepared(batch)
            if with_gradient:
                loss(output).backward()  # type: ignore[no-untyped-call]
    return captured


class recording:  # noqa: N801 - a context manager
    """Attach a recorder to the observers of the named ops, and take it away again whatever happens."""

    def __init__(self, prepared: GraphModule, names: Iterable[str], recorder: Any) -> None:
        wanted = set(names)
        self.observers = [m for m in observers(prepared) if m.op_name in wanted]
        self.recorder = recorder

    def __enter__(self) -> None:
        for observer in self.observers:
            observer.recorder = self.recorder

    def __exit__(self, *_: object) -> None:
        for observer in self.observers:
            observer.recorder = None


def observers(prepared: GraphModule) -> Iterator[ProductObserver]:
    """Yield the observers of a prepared model, in execution order of the plan."""
    return (module for module in prepared.modules() if isinstance(module, ProductObserver))


def captured_product(op: QuantOp, seen: Captured) -> Product:
    """Return the product of everything that was captured for one op."""
    gradient = torch.cat(seen.gradient) if seen.gradient else None
    rhs = seen.rhs[0] if op.rhs_is_weight else torch.cat(seen.rhs)
    return to_product(op, torch.cat(seen.lhs), rhs, seen.bias, gradient)


def captured_bytes(prepared: GraphModule) -> dict[str, int]:
    """Return the bytes per image that capturing each op takes, from the recorded shapes of the example."""
    sizes: dict[str, int] = {}
    for node in prepared.graph.nodes:
        name = node.meta.get("ptq4vit_op")
        if name is None:
            continue
        tensors = [node, node.args[0]] + ([] if node.args[1].op == "get_attr" else [node.args[1]])
        shapes = [tensor.meta["tensor_meta"].shape for tensor in tensors if "tensor_meta" in tensor.meta]
        images = max(1, int(prepared.meta["ptq4vit_example_batch"]))
        sizes[name] = 4 * sum(shape.numel() for shape in shapes) // images
    return sizes


def groups_of_ops(ops: Sequence[QuantOp], sizes: dict[str, int], images: int, limit: int) -> list[list[QuantOp]]:
    """Split the ops, in order, into groups whose captured tensors fit into `limit` bytes; at least one op each."""
    groups: list[list[QuantOp]] = [[]]
    used = 0
    for op in ops:
        need = sizes.get(op.name, 0) * images
        if groups[-1] and used + need > limit:
            groups.append([])
            used = 0
        groups[-1].append(op)
        used += need
    return groups
