"""What workers share of one call: written to a file once, read once by each worker, from there or from the client."""

from __future__ import annotations

import hashlib
import io
import os
import socket
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ptq4vit_fx.errors import PTQError, failure, foreign, reason_of
from ptq4vit_fx.files import not_a_file
from ptq4vit_fx.passes.graph.exclusive import exclusive

#: Bytes that are read of a file at a time, to compute its digest.
PIECE = 1 << 22
#: The state of the last call, by its digest: a worker that is asked again has it.
_KEPT: dict[str, Any] = {}


@dataclass(frozen=True)
class StateFile:
    """A file of torch.save, its digest and size in bytes, and the versions of the packages that wrote it.

    It holds pickles: a worker runs what its client sends, as every executor does, and reads no other file, which the
    digest makes sure of.
    """

    path: str
    digest: str
    size: int
    packages: tuple[tuple[str, str], ...]

    def content(self) -> bytes:
        """Return the bytes of the file, for a worker that cannot read it."""
        return Path(self.path).read_bytes()


def write_state(state: Any, path: Path, operation: str) -> StateFile:
    """Write what workers are going to share.

    Raises PTQError on what pickle cannot write, such as a function that was defined inside of another.
    """
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except PTQError as error:
        raise PTQError(f"{operation}: executor: {error}") from error
    except OSError:  # a full disk, of which `scratch` knows more
        raise
    except Exception as error:  # pickle lets what it writes raise anything
        expected = "a model and a loss that pickle can write"
        do = "define their functions and classes at the top of a module that workers can import"
        raise failure(operation, "executor", expected=expected, got=reason_of(error), do=do) from error
    return StateFile(str(path), _digest(path), path.stat().st_size, _packages())


def state_of(file: StateFile, content: bytes | None, operation: str) -> Any:
    """Return the state that a file holds, None where this worker neither has it nor can read it.

    content: the bytes of the file, if the client sent them. Only the state of the last call is kept. Raises PTQError
    where this worker has other packages than the client, or lacks what the model is made of.
    """
    if file.digest in _KEPT:
        return _KEPT[file.digest]
    _check_packages(file, operation)
    readable = content is None and not not_a_file(file.path) and os.path.getsize(file.path) == file.size
    if content is None and not (readable and _digest(Path(file.path)) == file.digest):
        return None
    expected, do = "a worker that has what the model is made of", "install it there, or put its folder on PYTHONPATH"
    with foreign(operation, f"worker {worker_name()}", expected=expected, do=do), exclusive():
        # From the file the tensors are mapped: the workers of one machine hold them once.
        source: Any = file.path if content is None else io.BytesIO(content)
        state = torch.load(source, map_location="cpu", mmap=content is None, weights_only=False)
    _KEPT.clear()
    _KEPT[file.digest] = state
    return state


def worker_name() -> str:
    """Return how a sentence names this process: its machine and its number there."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _check_packages(file: StateFile, operation: str) -> None:
    for (name, theirs), (_, mine) in zip(file.packages, _packages(), strict=True):
        if mine != theirs:
            subject, do = f"worker {worker_name()}", "install the same version on every machine"
            raise failure(operation, subject, expected=f"{name} {theirs}, as the client has", got=mine, do=do)


def _packages() -> tuple[tuple[str, str], ...]:
    return ("torch", torch.__version__), ("timm", version("timm")), ("ptq4vit-fx", version("ptq4vit-fx"))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
