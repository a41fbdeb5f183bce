"""Calibration on another device than the CPU, checked where there is none.

Tensors of the other device carry the label `meta` and hold their data on the CPU. Every operation is checked for what a
GPU refuses, operands on two devices, and then computed, so a run both proves that devices do not mix and gives numbers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import ptq4vit_fx as ptq
from ptq4vit_fx.calibrating import group_search
from ptq4vit_fx.search.search_op import search_op

ELSEWHERE = torch.device("meta")
aten = torch.ops.aten
TENSOR = torch.tensor
#: What may take operands of two devices: copies, and indexing with indices on the CPU.
MIXING = {aten._to_copy, aten.copy_, aten.index, aten.index_put_, aten.index_put}


class Remote(Tensor):
    """A tensor of the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=ELSEWHERE, storage_offset=0
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Remote({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Makes what is created on the other device, and catches what is put together across devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    remote = [x for x in tensors if isinstance(x, Remote)]
    if remote and func.overloadpacket not in MIXING:
        local = [x for x in tensors if not isinstance(x, Remote) and x.ndim > 0]
        if local:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    wanted = kwargs.get("device")
    to_remote = bool(remote) if wanted is None else torch.device(wanted) == ELSEWHERE
    if func.overloadpacket is aten.copy_:
        to_remote = isinstance(args[0], Remote)
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args_, kwargs_ = tree_map(lambda x: x.held if isinstance(x, Remote) else x, (args, kwargs))
    result = func(*args_, **kwargs_)
    if func._schema.is_mutable and isinstance(result, Tensor) and args_ and result is args_[0]:
        return args[0]
    return tree_map(lambda x: Remote(x) if isinstance(x, Tensor) else x, result) if to_remote else result


def tensor(data: Any, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """torch.tensor, which for the label `meta` alone would forget the data."""
    made = TENSOR(data, dtype=dtype)
    return made if device is None else made.to(device)


class Pool(ThreadPoolExecutor):
    """Its threads watch devices as well: a mode belongs to a thread."""

    def __init__(self, workers: int, name: str, initializer: Any = None) -> None:
        def enter() -> None:
            if initializer is not None:
                initializer()
            Devices().__enter__()

        super().__init__(workers, name, initializer=enter)


def test_the_check_refuses_what_a_gpu_refuses():
    with Devices():
        there = torch.arange(6.0, device=ELSEWHERE).view(2, 3)
        here = torch.ones(2, 3)
        assert there.sum().item() == 15
        assert torch.equal((there + 1).cpu(), torch.arange(1.0, 7.0).view(2, 3))
        assert (there * torch.tensor(2.0)).device == ELSEWHERE  # a number on the CPU is allowed
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            there @ here.t()


def same(first: ptq.Calibration, second: ptq.Calibration) -> bool:
    return first.params.keys() == second.params.keys() and all(
        torch.equal(getattr(a, name), getattr(second.params[site], name))
        for site, a in first.params.items()
        for name in vars(a)
        if isinstance(getattr(a, name), Tensor)
    )


@pytest.mark.parametrize(
    "where", [{"search_device": ELSEWHERE}, {"device": ELSEWHERE}, {"device": ELSEWHERE, "loss": "fisher"}]
)
@pytest.mark.parametrize(
    "mapping",
    [
        ptq.recipes.ptq4vit().with_search(n=30, screen_rows=16),
        ptq.recipes.ptq4vit(4, 4, weights="group").with_search(n=30, screen_rows=16),
        ptq.recipes.base_ptq().with_search(n=8, screen_rows=None),
    ],
    ids=["ptq4vit", "group", "base_ptq"],
)
def test_calibration_on_another_device_gives_the_same_scales(small_vit, small_images, mapping, where, monkeypatch):
    here = ptq.prepare_fx(small_vit, mapping, small_images[:1])
    expected = ptq.calibrate(here, small_images, progress=False, loss=where.get("loss", "pseudo_label"))
    monkeypatch.setattr(group_search, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(torch, "tensor", tensor)
    prepared = ptq.prepare_fx(small_vit, mapping, small_images[:1])
    searched: list[torch.device] = []

    def watched(op: Any, product: Any, *args: Any, **kwargs: Any) -> Any:
        searched.append(product.lhs.device)
        return search_op(op, product, *args, **kwargs)

    monkeypatch.setattr(group_search, "search_op", watched)
    with Devices():
        found = ptq.calibrate(prepared, small_images, progress=False, memory_limit=2**30, **where)
    assert set(searched) == {ELSEWHERE}
    assert same(expected, found)
    assert not any(isinstance(x, Remote) for x in prepared.state_dict().values())  # the model is back where it was
    assert torch.isfinite(ptq.convert_fx(prepared)(small_images)).all()
