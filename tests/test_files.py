"""Writing: whole or not at all, where the path means, and one sentence for whatever the system has against it."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ptq4vit_fx as ptq
from ptq4vit_fx import files
from ptq4vit_fx.files import LOCK, check_writable, make_folder, move, workplace, write_file


def write(path, content=b"new"):
    write_file(path, content, "test")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_a_new_file_has_the_mode_that_any_program_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask
    assert names(tmp_path) == ["a"]


def test_an_existing_file_keeps_its_mode(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o604)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o604


def test_a_link_stays_and_what_it_leads_to_is_written_there(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("old")
    (tmp_path / "link").symlink_to("there/a")
    (tmp_path / "chain").symlink_to(tmp_path / "link")
    (tmp_path / "dangling").symlink_to("there/b")
    for name, real in (("chain", "a"), ("dangling", "b")):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert not (tmp_path / "there" / real).is_symlink()
        assert (tmp_path / "there" / real).read_bytes() == b"new"
    assert names(tmp_path / "there") == ["a", "b"]


def test_what_is_no_regular_file_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, got in (
            *((f"{tmp_path}/{kind}", f"got a {kind};") for kind in ("pipe", "folder", "socket")),
            *((path, "got a device;") for path in ("/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")),
            (f"{tmp_path}/to_pipe", "got a pipe;"),
            (f"{tmp_path}/loop", "got Too many levels of symbolic links"),
            (f"{tmp_path}/pipe/a", "got Not a directory"),
            (f"{tmp_path}/none/a", "got no such folder, or no permission"),
        ):
            with pytest.raises(ptq.PTQError, match=f"^test: .*: expected a file in an existing, .*{got}"):
                check_writable(name, "test")
            with pytest.raises(ptq.PTQError, match=got):
                write(name)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert names(tmp_path) == ["folder", "loop", "pipe", "socket", "to_pipe"]


def test_names_as_long_as_names_get_are_written_and_longer_ones_refused(tmp_path):
    for name in ("x" * 240, "y" * 255, "ü" * 127, "a b\n", "\udcff", "*[?]"):
        write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new"
    assert len(names(tmp_path)) == 6
    for name, got in (("x" * 256, "File name too long"), ("ü" * 128, "File name too long"), ("a\0b", "null")):
        with pytest.raises(ptq.PTQError, match=got):
            write(tmp_path / name)
    with pytest.raises(ptq.PTQError, match="File name too long"):
        write(f"{tmp_path}{'/x' * 3000}")
    assert len(names(tmp_path)) == 6


@pytest.mark.parametrize("path", ["", "-", Path("-"), "a/", "\ud800", None, 1, object()])
def test_what_names_no_file_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ptq.PTQError, match=r"^test: .*expected (the path of )?a file") as refused:
        write(path)
    assert str(refused.value).isprintable()
    assert not names(tmp_path)


def test_a_file_may_be_called_like_standard_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("./-")
    write(b"bytes")
    assert names(tmp_path) == ["-", "bytes"]


def in_a_process(code, **limits):
    """Run Python with `write`, with limits of resources, and return what it prints."""

    def limit():
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))

    given = "import sys, pathlib, ptq4vit_fx as ptq\nfrom ptq4vit_fx.files import write_file\n"
    done = subprocess.run(
        [sys.executable, "-c", given + code], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr[-2000:]


def test_a_file_above_the_limit_is_one_sentence_and_the_old_one_stays(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    code = f"""
try:
    write_file({str(path)!r}, b"x" * 50_000_000, "test")
except ptq.PTQError as error:
    print(error)
"""
    said = in_a_process(code, RLIMIT_FSIZE=1_000_000)
    assert said.startswith(f"test: {path}: expected room for 50,000,000 bytes, got File too large, ")
    assert " bytes are free; make room" in said
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no permission to mount: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_sentence_with_what_is_needed_and_free(tiny_disk, small_converted, small_images):
    old = tiny_disk / "scales.safetensors"
    old.write_text("old")
    for attempt, said in (
        (
            lambda: write(old, b"x" * 100_000),
            "test: .*: expected room for 100,000 bytes, got No space left on device, [0-9,]+ bytes are",
        ),
        (lambda: ptq.export_onnx(small_converted, tiny_disk / "m.onnx", small_images[:1]), "export_onnx: .*No space"),
    ):
        with pytest.raises(ptq.PTQError, match=said):
            attempt()
        assert names(tiny_disk) == ["scales.safetensors"]
        assert old.read_text() == "old"
    (tiny_disk / "rest").write_bytes(b"x" * 58_000)
    with pytest.raises(ptq.PTQError, match=r"save calibration: .*scales\.safetensors: expected room .*No space left"):
        small_converted.calibration.save(old)
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(ptq.PTQError, match=r"no permission to write there|Read-only file system"):
        write(old)


@pytest.mark.parametrize("number", ["EIO", "EDQUOT", "EROFS", "ENOSPC"])
def test_what_the_system_says_while_a_file_is_moved_is_one_sentence(tmp_path, monkeypatch, number):
    code = getattr(errno, number)

    def fails(*_):
        raise OSError(code, os.strerror(code))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ptq.PTQError, match=f"^test: .*a: expected .*{os.strerror(code)}.*choose another path$"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_bytes_are_on_the_disk_before_the_name_and_the_folder_behind(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, name=name, real=real):
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            calls.append("folder" if is_folder else name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    write(tmp_path / "a")
    assert calls == ["fsync", "replace", "folder"]


def test_what_a_killed_writer_left_is_removed_and_a_live_ones_stays(tmp_path):
    target = tmp_path / "a"
    waiting = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib\nfrom ptq4vit_fx.files import workplace\n"
            f"with workplace(pathlib.Path({str(target)!r}), 'test', 0) as folder:\n"
            "    (folder / 'half').write_text('half'); print(folder, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert waiting.stdout is not None
    folder = Path(waiting.stdout.readline().strip())
    write(target)
    assert (folder / "half").exists()  # it lives
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    write(tmp_path / "another")
    assert (folder / "half").exists()  # another file's
    write(target)
    assert names(tmp_path) == ["a", "another"]


def test_a_writer_that_was_killed_before_its_lock_leaves_nothing_either(tmp_path):
    with workplace(tmp_path / "a", "test", 0) as folder:
        pattern = folder.name
    (tmp_path / pattern).mkdir()
    write(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_taken_for_abandoned_too_early_is_made_again(tmp_path, monkeypatch):
    real, made = files._locked, []

    def locked(path):
        made.append(path.parent)
        if len(made) == 1:  # another writer is quicker
            path.parent.rmdir()
        return real(path)

    monkeypatch.setattr(files, "_locked", locked)
    with workplace(tmp_path / "a", "test", 0) as folder:
        assert folder == made[1] != made[0]
        assert (folder / LOCK).exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_made_again(tmp_path, monkeypatch):
    real, times = files._lock, []

    def lock(file, patience):
        times.append(patience)
        if len(times) == 1:
            (tmp_path / LOCK).unlink()
        return real(file, patience)

    monkeypatch.setattr(files, "_lock", lock)
    os.close(files._locked(tmp_path / LOCK))
    assert len(times) == 2


def test_links_and_pipes_in_the_place_of_locks_are_neither_followed_nor_waited_for(tmp_path):
    target = tmp_path / "a"
    with workplace(target, "test", 0) as folder:
        name = folder.name
    mark = name[: name.rindex("-") + 1]
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to(tmp_path / "elsewhere"))):
        (tmp_path / f"{mark}{number}.tmp").mkdir()
        make(tmp_path / f"{mark}{number}.tmp" / LOCK)
        make(tmp_path / f"{mark}lock")
        with files.alone(target):
            write(target)
        (tmp_path / f"{mark}lock").unlink(missing_ok=True)
    assert not (tmp_path / "elsewhere").exists()
    assert target.read_bytes() == b"new"


def test_writers_of_one_path_at_the_same_time_leave_one_whole_file(tmp_path):
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: [write(tmp_path / "a", content) for _ in range(20)], contents))
    assert (tmp_path / "a").read_bytes() in contents
    assert names(tmp_path) == ["a"]


def test_locks_that_a_file_system_has_not_are_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_lock", lambda file, patience: False)
    with workplace(tmp_path / "a", "test", 0) as other:
        write(tmp_path / "a")
        assert other.exists()
        with files.alone(tmp_path / "a"):
            move(_written(other), tmp_path / "a")
    assert names(tmp_path) == ["a"]


def _written(folder):
    (folder / "b").write_text("b")
    return folder / "b"


def test_a_process_killed_anywhere_leaves_an_old_or_a_new_file(tmp_path):
    path = tmp_path / "a"
    code = (
        f"for n in range(10**9): write_file({str(path)!r}, bytes([n % 256]) * 300_000, 'test'); n or print(flush=True)"
    )
    given = "from ptq4vit_fx.files import write_file\n"
    for delay in (0.0, 0.003, 0.007, 0.011):
        with subprocess.Popen([sys.executable, "-c", given + code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1
    write(path)
    assert names(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    make_folder(tmp_path / "a" / "b", "test")
    make_folder(tmp_path / "a" / "b", "test")
    for name in ("file", "file/a", "x" * 256, "a\0b"):
        with pytest.raises(ptq.PTQError, match=r"^test: .*: expected a folder, got "):
            make_folder(tmp_path / name, "test")
    with pytest.raises(ptq.PTQError, match="standard output, which is not supported"):
        make_folder(Path("-"), "test")
