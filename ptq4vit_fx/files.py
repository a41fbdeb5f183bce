"""Files that are read are files. Those that are written appear whole or not at all, or there is one sentence.

A file is written in a temporary folder beside it, and moved. Whoever writes holds a lock there, which ends with the
process: what a killed one leaves is removed when the same path is written again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ptq4vit_fx.errors import PTQError, failure, quoted, reason_of

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and what killed processes leave stays
    fcntl = None  # type: ignore[assignment]

#: The file of a temporary folder that its writer keeps locked.
LOCK = ".lock"
#: How it is opened: a link or a pipe of that name, which anybody may have put there, is not followed nor waited for.
OPEN_LOCK = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
#: Seconds that one writer waits for another to move its files; their bytes are on the disk by then.
PATIENCE = 60.0
#: What the system says where there is no room: on the disk, for this user, for a file of this process (`ulimit -f`).
NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
#: What `not_a_file` says of a path that leads to nothing.
NOTHING, DANGLING = "no such file", "a link to nothing"


def check_readable(path: str | os.PathLike[str], operation: str, expected: str) -> Path:
    """Return the path of a file to be read; raises PTQError on what is none: opening a pipe would wait for ever."""
    name = _name_of(path, operation)
    got = not_a_file(name) or ("" if os.access(name, os.R_OK) else "no permission to read it")
    if got:
        raise failure(operation, name, expected=expected, got=got, do="check the path")
    return Path(name)


def not_a_file(path: str | os.PathLike[str]) -> str:
    """Return what is at a path if it is no regular file, nor a link to one; "" if it is."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return DANGLING if os.path.islink(path) else NOTHING
    except (OSError, ValueError) as error:  # a loop of links, a file in the place of a folder, a NUL
        return getattr(error, "strerror", None) or reason_of(error)
    kinds = {stat.S_IFREG: "", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def check_writable(path: str | os.PathLike[str], operation: str) -> Path:
    """Return the file that a path means, behind symbolic links; it may not exist yet.

    Raises PTQError if its folder is missing or not writable, if it is no regular file, and on names that no file has.
    "-" is refused, which other programs take for standard output; "./-" is a file.
    """
    name = _output_name(path, operation)
    if not name or name.endswith(("/", os.sep)):
        do = "name the file in it"
        raise failure(operation, repr(name), expected="the path of a file", got="that of a folder", do=do)
    got = "a device" if _is_special(name) else not_a_file(name)
    if got not in ("", NOTHING, DANGLING):
        raise _unwritable(operation, name, got)
    target = Path(os.path.realpath(name))
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        got, do = "no such folder, or no permission to write there", "create the folder or choose another path"
        raise _unwritable(operation, name, got, do)
    return target


def write_file(path: str | os.PathLike[str], content: bytes, operation: str) -> None:
    """Write a file whole or not at all. Raises PTQError, and leaves what was there, if that is not possible."""
    target = check_writable(path, operation)
    with workplace(target, operation, len(content)) as folder:
        written = folder / "content"
        written.write_bytes(content)
        move(written, target)


def make_folder(path: Path, operation: str) -> None:
    """Create a folder and those above it, unless it is there; raises PTQError if that is not possible."""
    _output_name(path, operation)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        got, do = getattr(error, "strerror", None) or reason_of(error), "choose another path"
        raise failure(operation, str(path), expected="a folder", got=got, do=do) from error


@contextmanager
def workplace(target: Path, operation: str, size: int, elsewhere: str = "choose another path") -> Iterator[Path]:
    """Yield a temporary folder beside a file to be written, and remove it whatever happens.

    size: bytes that are going to be written, and elsewhere, how to write them to another place, for the sentence.
    Raises PTQError in the place of an OSError.
    """
    try:
        with _own_folder(target) as folder:
            yield folder
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise _unwritable(operation, str(target), _reason(error), elsewhere) from error
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(target.parent).free:,} bytes are free"
        expected, got, do = f"room for {size:,} bytes", f"{error.strerror}{free}", f"make room, or {elsewhere}"
        raise failure(operation, str(target), expected=expected, got=got, do=do) from error


@contextmanager
def scratch(operation: str, size: int) -> Iterator[Path]:
    """Yield a temporary folder where the system has such, as `workplace` does."""
    do = "set TMPDIR to a folder with room"
    try:
        place = Path(tempfile.gettempdir())
    except OSError as error:  # none is writable
        raise _unwritable(operation, "temporary folder", _reason(error), do) from error
    with workplace(place / "ptq4vit_fx", operation, size, do) as folder:
        yield folder


def move(written: Path, target: Path) -> None:
    """Give a written file its name: its bytes are on the disk before, and the name is behind. Keeps an old file's mode.

    Raises OSError.
    """
    flush(written)
    with suppress(FileNotFoundError):
        written.chmod(target.stat().st_mode & 0o777)
    os.replace(written, target)
    with suppress(OSError):  # not every system can do this to a folder, and the file is complete
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def flush(written: Path) -> None:
    """Return when the bytes of a file are on the disk. Raises OSError."""
    with written.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Keep others who write the same path waiting, where the file system has locks, but not for ever."""
    path = target.parent / f"{_mark(target)}lock"
    with ExitStack() as stack:
        with suppress(OSError):  # a link or a pipe that somebody put there: do without
            file = _locked(path)
            stack.callback(os.close, file)
            stack.callback(path.unlink, missing_ok=True)
        yield


@contextmanager
def _own_folder(target: Path) -> Iterator[Path]:
    for abandoned in target.parent.glob(f"{_mark(target)}*.tmp"):
        _remove_abandoned(abandoned)
    folder, lock = _locked_folder(target)
    try:
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(target: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(".tmp", _mark(target), target.parent))
        with suppress(FileNotFoundError):  # another writer took it for abandoned before it was locked: try again
            return folder, _locked(folder / LOCK)


def _locked(path: Path) -> int:
    """Return a file that is open and locked, made if need be; raises FileNotFoundError if its folder is gone."""
    while True:
        file = os.open(path, OPEN_LOCK | os.O_CREAT, 0o666)
        if not _lock(file, PATIENCE) or _is_at(file, path):
            return file
        os.close(file)  # who held it has removed it


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folder of a writer that lives no longer; one that is locked stays."""
    with suppress(OSError):
        if not (folder / LOCK).exists():
            folder.rmdir()
            return
        file = os.open(folder / LOCK, OPEN_LOCK)
        if _lock(file, 0.0):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(file)


def _mark(target: Path) -> str:
    """Return how the names of what belongs to one file start: short, for the file's own may be as long as names get."""
    return f".ptq4vit-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


def _lock(file: int, patience: float) -> bool:
    """Lock an open file until it is closed or the process ends; return whether it is locked after so many seconds."""
    if fcntl is None:
        return False
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another has it
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)
        except OSError:  # the file system has no locks
            return False
        else:
            return True


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is still the one with this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.lstat())
    return False


def _name_of(path: str | os.PathLike[str], operation: str) -> str:
    try:
        return os.fsdecode(path)
    except TypeError as error:
        got, do = type(path).__name__, "pass text or a pathlib.Path"
        raise failure(operation, quoted(path), expected="the path of a file", got=got, do=do) from error


def _output_name(path: str | os.PathLike[str], operation: str) -> str:
    name = _name_of(path, operation)
    if name == "-":
        do = "name a file, by its whole path if it is called so"
        raise failure(operation, "'-'", expected="a file", got="standard output, which is not supported", do=do)
    return name


def _is_special(name: str) -> bool:
    """Return whether a path lies where the system has no files: /dev/stdout is none also where it was sent to one."""
    with suppress(ValueError):
        folder = os.path.realpath(os.path.dirname(name))
        return folder == "/dev" or folder.startswith("/proc/")
    return False


def _unwritable(operation: str, name: str, got: str, do: str = "choose another path") -> PTQError:
    return failure(operation, name, expected="a file in an existing, writable folder", got=got, do=do)


def _reason(error: OSError) -> str:
    """Return what the system says, and of which file if that is another than the one to be written."""
    if not error.strerror:
        return reason_of(error)
    of_another = error.filename and ".ptq4vit-" not in str(error.filename)
    return f"{error.strerror}, {quoted(str(error.filename))}" if of_another else error.strerror
