"""Files that are written appear whole or not at all; files that are read are files."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptq4vit_fx.errors import failure


@contextmanager
def atomic_path(path: str | os.PathLike[str], operation: str) -> Iterator[str]:
    """Yield a temporary path beside `path`; move it there on success, remove it on any error or interrupt.

    Raises PTQError if the folder does not exist or is not writable.
    """
    target = check_writable(path, operation)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private; an output file should not be
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(path: str | os.PathLike[str], operation: str) -> Path:
    """Return the path of a file to be written; raises PTQError if its folder is missing or not writable."""
    target = Path(path)
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK) or target.is_dir():
        raise failure(
            operation,
            str(target),
            expected="a file in an existing, writable folder",
            got="a folder" if target.is_dir() else "no such folder, or no permission to write there",
            do="create the folder or choose another path",
        )
    return target


def check_readable(path: str | os.PathLike[str], operation: str, expected: str) -> Path:
    """Return the path of a file to be read; raises PTQError on what is none: opening a pipe would wait for ever."""
    got = not_a_file(path)
    if got:
        raise failure(operation, os.fsdecode(path), expected=expected, got=got, do="check the path")
    return Path(path)


def not_a_file(path: str | os.PathLike[str]) -> str:
    """Return what is at a path if it is no regular file, nor a link to one; "" if it is."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link to nothing" if os.path.islink(path) else "no such file"
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        return str(error)
    kinds = {stat.S_IFREG: "", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
