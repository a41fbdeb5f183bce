"""Archives of image files, `.zip` and `.tar` (WebDataset's too): members are read in memory, never unpacked.

What a member is called leads nowhere: links, devices and folders in an archive are passed over.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from ptq4vit_fx.data.classes import class_number, numbers_of
from ptq4vit_fx.data.folders import is_image, visible
from ptq4vit_fx.data.pictures import LARGEST, Images, Stored
from ptq4vit_fx.errors import failure, foreign

#: How the suffixes of tars are opened; those that are compressed are read from their start to where a member lies.
TARS: dict[str, Callable[[Path], Any]] = {
    **{".tar": partial(open, mode="rb"), ".tgz": gzip.open, ".gz": gzip.open},
    **{".tbz2": bz2.open, ".bz2": bz2.open, ".txz": lzma.open, ".xz": lzma.open},
}
#: Bytes of one header of a tar: names are short, and a header that says otherwise would fill the memory.
LONGEST_HEADER = 2**20
#: Characters of a file with a class number.
LONGEST_NUMBER = 32


@dataclass(frozen=True)
class Member:
    """An image in an archive: its name there, what reads it, and its class number, where the archive says it."""

    name: str
    read: Callable[[], bytes]
    label: int | None = None


def open_zip(path: Path, *, entry: str | None, labelled: bool) -> Images:
    """Return the images of a zip archive, in the order of their names; classes are its folders."""
    with foreign("read images", str(path), expected="a zip archive", do="pack it again"):
        archive = zipfile.ZipFile(path)
        infos = [info for info in archive.infolist() if not info.is_dir() and _wanted(info.filename)]
    members = [Member(info.filename, partial(_unzipped, archive, info)) for info in infos]
    return _images(path, [(path, member) for member in members])


def _unzipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > LARGEST:
        raise ValueError(f"{info.file_size} bytes: no picture is that large")
    return archive.read(info)


def open_tar(path: Path, *, entry: str | None, labelled: bool) -> Images:
    """Return the images of a tar archive; classes are its folders, or the numbers in `.cls` files beside the images."""
    return open_tars(path, [path], labelled=labelled)


def open_tars(data: Path, paths: Sequence[Path], *, labelled: bool) -> Images:
    """Return the images of several tar archives, the shards of one set."""
    found = []
    for path in paths:
        with foreign("read images", str(path), expected="a whole tar archive", do="pack or download it again"):
            found += [(path, member) for member in _members(path, labelled=labelled)]
    return _images(data, found)


class _Headers(io.RawIOBase):
    """A stream of which nothing is read at once that is longer than a header."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        return self.stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()


def _members(path: Path, *, labelled: bool) -> Iterator[Member]:
    """Yield the images of a tar, in the order of their samples, with the class numbers of WebDataset."""
    opener = TARS[path.suffix.lower()]
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with opener(path) as stream, tarfile.open(fileobj=_Headers(stream), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            if not member.isreg() or member.issparse():
                continue
            if _wanted(member.name):
                places[member.name] = (member.offset_data, member.size)
            elif labelled and member.name.endswith(".cls"):
                stream.seek(member.offset_data)
                number = class_number(stream.read(min(member.size, LONGEST_NUMBER)).decode("ascii", "replace").strip())
                if number is not None:
                    labels[_sample(member.name)[0]] = number
        stream.seek(archive.offset)
        if any(stream.read(tarfile.BLOCKSIZE)):  # tarfile takes a header that is cut or damaged for the end
            raise ValueError(f"no header at byte {archive.offset}")
    plain = {_sample(name)[0] for name in places if "." not in _sample(name)[1]}
    read = partial(_untarred, opener(path) if opener is not TARS[".tar"] else None, path)
    for name, place in places.items():
        key, kind = _sample(name)
        if "." not in kind or key not in plain:  # `7.seg.png` beside `7.jpg` is a mask
            yield Member(name, partial(read, *place), labels.get(key))


def _sample(name: str) -> tuple[str, str]:
    """Return what WebDataset takes for the sample that a member belongs to, and for its kind."""
    folder, slash, file = name.rpartition("/")
    key, _, kind = file.partition(".")
    return f"{folder}{slash}{key}", kind


def _untarred(stream: IO[bytes] | None, path: Path, start: int, size: int) -> bytes:
    """Return a member; stream: of a compressed archive, which goes on from where it is."""
    if size > LARGEST:
        raise ValueError(f"{size} bytes: no picture is that large")
    if stream is None:
        with open(path, "rb") as plain:
            return _piece(plain, start, size)
    return _piece(stream, start, size)


def _piece(stream: IO[bytes], start: int, size: int) -> bytes:
    stream.seek(start)
    content = stream.read(size)
    if len(content) != size:
        raise ValueError("the archive ends before it")
    return content


def _wanted(name: str) -> bool:
    return is_image(name) and all(map(visible, name.removeprefix("./").split("/")))


def _images(data: Path, found: Sequence[tuple[Path, Member]]) -> Images:
    """Return members as pictures in the order of their names; labels where each has one, or lies in a folder."""
    if not found:
        do = "pass one that holds .jpg or .png files"
        raise failure("read images", str(data), expected="an archive of images", got="none in it", do=do)
    found = sorted(found, key=lambda one: (one[0], one[1].name.split("/")))
    items = tuple(Stored(f"{path}: {member.name}", member.read) for path, member in found)
    numbers = [member.label for _, member in found if member.label is not None]
    if numbers:
        if len(numbers) < len(found):
            one = next(item for item, (_, member) in zip(items, found, strict=True) if member.label is None)
            got, do = f"none for {one}", "add them, or take these out"
            raise failure("read images", str(data), expected="a .cls file with each image", got=got, do=do)
        return Images(items, tuple(numbers))
    folders = _folders([member.name for _, member in found])
    if not all(folders):
        return Images(items)
    classes = sorted(set(folders))
    return Images(items, numbers_of(folders, classes, str(data)), tuple(classes))


def _folders(names: Sequence[str]) -> list[str]:
    """Return the folder of each name, "" of those without, behind what all of them have in common."""
    parts = [name.removeprefix("./").split("/")[:-1] for name in names]
    while all(len(folders) > 1 for folders in parts) and len({folders[0] for folders in parts}) == 1:
        parts = [folders[1:] for folders in parts]
    return [folders[0] if folders else "" for folders in parts]
