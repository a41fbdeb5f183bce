"""Folders and images that nobody made with care, or that somebody made with malice: skipped by name, or a sentence."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import socket
import struct
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import timm.data
from PIL import Image
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.data.classes import class_number
from ptq4vit_fx.data.folders import list_images
from ptq4vit_fx.data.reading import read_images
from ptq4vit_fx.tools.cli import app

TRANSFORM = timm.data.create_transform((3, 16, 16))
#: Memory that a picture may take that is not there.
MOST = 200 * 2**20


def encoded(kind: str, width: int = 32, height: int = 32, mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def tiff(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 10}
    entries = b"".join(struct.pack("<HHII", key, 4, 1, value) for key, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def gif(width: int, height: int) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\1\0\0;"


def webp(width: int, height: int) -> bytes:
    bits = b"/" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(8)
    return b"RIFF" + struct.pack("<I", 12 + len(bits)) + b"WEBPVP8L" + struct.pack("<I", len(bits)) + bits


SIDES = {
    "sides of 99,999": (99_999, 99_999),
    "sides of 13,000": (13_000, 13_000),
    "a thread": (1, 60_000),
    "0 x 0": (0, 0),
}
HEADERS = {
    "png": png,
    "bmp": bmp,
    "tif": tiff,
    "ppm": lambda width, height: f"P6 {width} {height} 255\n".encode(),
}
CUT = {kind: encoded(name) for kind, name in (("png", "PNG"), ("jpg", "JPEG"), ("tif", "TIFF"), ("webp", "WEBP"))}
PICTURES = {
    **{f"{kind}: {name}": (kind, head(*SIDES[name])) for kind, head in HEADERS.items() for name in SIDES},
    **{f"gif: sides of {side}": ("gif", gif(side, side)) for side in (0, 13_000, 65_535)},
    **{f"webp: sides of {side}": ("webp", webp(side, side)) for side in (13_000, 16_384)},
    **{f"{kind} cut": (kind, content[: len(content) // 2]) for kind, content in CUT.items()},
    "20 bytes": ("ppm", b"P6 99999 99999 255"),
    "5,000 digits": ("ppm", b"P6 " + b"9" * 5000 + b" 5 255\n"),
    "a thread of 100,000": ("png", encoded("PNG", 1, 100_000, "1")),
    "a bomb": ("png", encoded("PNG", 20_000, 20_000, "1")),
    "a program": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
    "text": ("png", b"no"),
    "nothing": ("jpg", b""),
}


def readable(paths) -> tuple[int, list[str]]:
    """Return how many images are read, and what is said of the others; no warning but Pillow's of many pixels."""
    skipped: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return len(list(read_images(paths, TRANSFORM, skipped))), skipped


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_is_none_is_skipped(tmp_path, name):
    suffix, content = PICTURES[name]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    count, skipped = readable([path])
    assert (count, len(skipped)) == (0, 1)
    assert skipped[0].startswith(f"{path}: ")
    assert skipped[0].isprintable()


def most_memory(folder: Path) -> int:
    """Read every picture of `folder`; return the bytes by which this process has grown meanwhile."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readable(sorted(folder.iterdir()))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_pictures_that_are_none_take_no_memory(tmp_path):
    for place, (suffix, content) in enumerate(PICTURES.values()):
        (tmp_path / f"{place}.{suffix}").write_bytes(content)
    # A new process: what another test has freed here would be written again, and count.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(most_memory, tmp_path).result() < MOST


def test_pictures_of_every_format_are_read(tmp_path):
    kinds = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "ppm": "PPM"}
    for suffix, kind in kinds.items():
        (tmp_path / f"a.{suffix}").write_bytes(encoded(kind, 300, 2))
        (tmp_path / f"other.{suffix}").write_bytes(encoded("WEBP"))  # what it is decides, not its name
    assert readable(list_images(tmp_path).items) == (2 * len(kinds), [])


def test_memory_that_is_not_there_is_said_before_it_is_taken(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded("PNG", 1000, 1000))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10 * 2**20}))
    assert readable([tmp_path / "a.png"])[1][0].endswith("1000 x 1000 pixels take 0.0 GiB, 0.0 are free")


def test_what_is_no_file_is_never_opened(tmp_path):
    (tmp_path / "z.png").write_bytes(encoded("PNG"))
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to(tmp_path / "d.png")
    (tmp_path / "e.png").symlink_to(tmp_path / "none")
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket has 107 bytes at most
        made.bind("f.png")
        os.chdir(here)
    count, skipped = readable(list_images(tmp_path).items)
    assert count == 1
    said = [line.partition(".png: ")[2] for line in skipped]
    assert [*said[:3], *said[4:]] == ["a pipe", "a pipe", "a device", "a link to nothing", "a socket"]
    assert "Too many levels of symbolic links" in said[3]


@pytest.mark.parametrize("kind", ["pipe", "device", "missing", "null byte", "circle"])
def test_what_is_no_folder_is_a_sentence(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    paths = {"device": Path("/dev/zero"), "null byte": tmp_path / "a\0b"}
    with pytest.raises(ptq.PTQError, match=r"^read images: .* expected a folder of images, got (a|no such) "):
        list_images(paths.get(kind, tmp_path / kind))


def test_folders_deeper_than_python_recurses(tmp_path):
    here, depth = Path.cwd(), 1500
    os.chdir(tmp_path)
    for _ in range(depth):
        os.mkdir("a")
        os.chdir("a")
    Path("a.png").write_bytes(encoded("PNG"))
    try:
        assert len(list_images(tmp_path).items) == 1
    finally:  # pytest recurses
        Path("a.png").unlink()
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("a")
        os.chdir(here)


def labelled(folder: Path, *names: str):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(b"")
    return list_images(folder, labelled=True)


def test_numbers_are_digits_of_ascii(tmp_path):
    assert [class_number(name) for name in ("0", "10", "007")] == [0, 10, 7]
    others = ("²", "٣", "-1", "+1", " 1", "1 ", "1_0", "1.0", "", "9" * 5000, "1\n", "Ⅷ", "①")
    assert {class_number(name) for name in others} == {None}
    found = labelled(tmp_path, "1", "²", "٣", "9" * 200)
    assert (found.classes, found.labels) == (("1", "9" * 200, "²", "٣"), (0, 1, 2, 3))


def test_two_folders_of_one_number_are_refused(tmp_path):
    with pytest.raises(ptq.PTQError, match="expected one sub-folder per class, got 01, 1; put their images into one"):
        labelled(tmp_path, "01", "1", "2")


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    listed, scandir = [], os.scandir

    def counted(path):
        listed.append(str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", counted)
    labelled(tmp_path, "a", "b")
    assert listed == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "b")]


NAMES = {
    "colours": b"\x1b[31mred\x1b[0m.png",
    "a bell and a return": b"\x07\r\nerror: all is well.png",
    "text from right to left": "\u202egnp.exe.png".encode(),
    "C1": "\x9b31m.png".encode(),
    "no UTF-8": b"\xff\xfe.png",
    "styles": b"[bold][red].png",
    "an emoji": b":bomb:.png",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_and_not_obeyed(tmp_path, name):
    (tmp_path / os.fsdecode(NAMES[name])).write_bytes(b"no image")
    arguments = ["quantize", "vit_tiny_patch16_224", "--data", str(tmp_path), "--out", str(tmp_path / "m.onnx")]
    sizes = ("img_size=32", "embed_dim=48", "depth=1", "num_heads=3", "pretrained_cfg=None")
    arguments += [part for size in sizes for part in ("--model-arg", size)]
    result = CliRunner().invoke(app, [*arguments, "--weights", str(tmp_path / os.fsdecode(NAMES[name]))])
    assert result.exit_code == 1
    assert result.output.replace("\n", "").isprintable()
    assert result.output.count("\n") == 1
    assert "error: load weights" in result.output
    if name in ("styles", "an emoji"):
        assert NAMES[name].decode() in result.output


def test_a_terminal_that_knows_ascii_alone(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(
        "ptq4vit_fx.tools.cli.complaints._file", stream
    )  # its `file`, once set, would stay stdout of today
    (tmp_path / "é").write_bytes(b"no")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "é")])
    stream.flush()
    assert result.exit_code == 1
    assert rb"\xe9: expected an ONNX model" in stream.buffer.getvalue()
