"""Tracers and exporters change torch while they run: one of them at a time, and only its own thread sees the change.

torch.export switches off oneDNN for the process, and with it the last bit of a convolution: what is compared or
differentiated runs in its turn too.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.fx._symbolic_trace import _Patcher

#: Whoever traces, computes shapes or exports holds it; what is called within may take it again.
_TURN = threading.RLock()


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Wait until no other thread is here, then be alone; a decorator too.

    torch.fx and torch.export replace methods of nn.Module for every thread. Within, they replace them for the thread
    that traces: models of others, which serve requests meanwhile, run as always.
    """
    with _TURN:
        replace = _Patcher.patch_method
        setattr(_Patcher, "patch_method", functools.partialmethod(_patch_for_own_thread, replace))  # noqa: B010
        try:
            yield
        finally:
            setattr(_Patcher, "patch_method", replace)  # noqa: B010 - a method, to mypy


def _patch_for_own_thread(
    patcher: _Patcher,
    replace: Callable[..., None],
    kind: type,
    name: str,
    method: Callable[..., Any],
    deduplicate: bool = True,
) -> None:
    own, original = threading.get_ident(), getattr(kind, name)

    @functools.wraps(method)
    def only_here(*args: Any, **kwargs: Any) -> Any:
        return (method if threading.get_ident() == own else original)(*args, **kwargs)

    replace(patcher, kind, name, only_here, deduplicate)
