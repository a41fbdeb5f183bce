"""Capture: one forward and one backward per batch give every product's operands and the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.calibrating.gradients import differentiate
from ptq4vit_fx.calibrating.losses import Loss
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import failure
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.dataflow import overwrites
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.observer import ProductObserver
from ptq4vit_fx.passes.graph.running import run
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.search.products import Product, to_product


@dataclass
class Captured:
    """What one product read, and (dL/dout)^2, a tensor per batch; a weight or bias is kept once."""

    lhs: list[Tensor] = field(default_factory=list)
    rhs: list[Tensor] = field(default_factory=list)
    importance: list[Tensor] = field(default_factory=list)
    bias: Tensor | None = None


def capture(
    prepared: GraphModule,
    ops: Sequence[QuantOp],
    batches: Iterable[Inputs],
    *,
    loss: Loss,
    with_gradient: bool,
    quantized: Calibration | None = None,
) -> dict[str, Captured]:
    """Run the observed model on every batch and return what the observers of `ops` saw, float32.

    Only gradients of activations are computed: no parameter and no image requires one. quantized: the products
    that this calibration has parameters for run quantized (sequential calibration), all others in float.
    """
    captured = {op.name: Captured() for op in ops}
    weights = {op.name for op in ops if op.rhs_is_weight}
    is_written = any(overwrites(node) for node in prepared.graph.nodes)  # perhaps an operand, after it was read

    def record(name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        seen = captured[name]
        check_finite(f"input of {name}", lhs)
        check_finite(f"{'weight' if name in weights else 'right operand'} of {name}", rhs)
        if name not in weights and out.ndim > 2:  # broadcast operands are stored once per image, like the others
            lhs = lhs.expand(*out.shape[:-2], *lhs.shape[-2:])
            rhs = rhs.expand(*out.shape[:-2], *rhs.shape[-2:])
        seen.lhs.append(lhs.detach().clone() if is_written else lhs.detach())
        if name not in weights or not seen.rhs:
            seen.rhs.append(rhs.detach().clone() if is_written else rhs.detach())
        seen.bias = None if bias is None else bias.detach()
        if with_gradient:
            if not out.requires_grad:  # nothing before this product is differentiated: start here
                out = out.detach().requires_grad_(True).clone()  # no leaf: the graph may write into it
            out.register_hook(accumulate(seen))  # type: ignore[no-untyped-call]
        return out

    def accumulate(seen: Captured) -> Callable[[Tensor], None]:
        batch = len(seen.lhs)

        def add(gradient: Tensor) -> None:
            check_finite("the gradient of the loss", gradient)
            if len(seen.importance) < batch:
                seen.importance.append(gradient.square())
            else:
                seen.importance[-1].addcmul_(gradient, gradient)

        return add

    def record_quantized(name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        assert quantized is not None
        return quantized.product(name, lhs, rhs, bias).to(out.dtype)

    finished = set() if quantized is None else set(quantized.distances)
    with recording(prepared, captured, record), recording(prepared, finished, record_quantized):
        for batch in batches:
            with exclusive():
                with torch.set_grad_enabled(with_gradient):
                    output = run(prepared, batch, "calibrate")
                if with_gradient:
                    differentiate(loss, output, len(batch[0]))
    return captured


def check_finite(what: str, x: Tensor) -> None:
    """Raise PTQError, which names what it is, on a tensor with NaN or infinity."""
    if not all(torch.isfinite(bound) for bound in torch.aminmax(x.detach())):
        raise failure(
            "calibrate",
            what,
            expected="finite values",
            got="NaN or infinity",
            do="run the float model on these images and look where its values become infinite",
        )


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
    importance = _joined(op, seen.importance) if seen.importance else None
    rhs = seen.rhs[0] if op.rhs_is_weight else _joined(op, seen.rhs)
    return to_product(op, _joined(op, seen.lhs), rhs, seen.bias, importance)


def _joined(op: QuantOp, parts: list[Tensor]) -> Tensor:
    """Return what batches gave as one tensor; the last batch is often smaller, whichever dimension the images are in.

    In front of a weight every dimension but the last is rows. Matrices of two activations are stacked, each filled up
    with zeros to the largest: zeros are exact in every quantizer, and what they add to a product is zero.
    """
    if op.kind == "conv2d":
        return torch.cat(parts)
    if op.rhs_is_weight:
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in parts])
    stacks = [x if x.ndim > 2 else x[None] for x in parts]
    largest = [max(sizes) for sizes in zip(*(x.shape[1:] for x in stacks), strict=True)]
    return torch.cat([_filled(x, largest) for x in stacks])


def _filled(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return x with zeros behind its values in every dimension but the first, up to these sizes."""
    lacking = [size - own for own, size in zip(x.shape[1:], sizes, strict=True)]
    if not any(lacking):
        return x
    return F.pad(x, [amount for lack in reversed(lacking) for amount in (0, lack)])
