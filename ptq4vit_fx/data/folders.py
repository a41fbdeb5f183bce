"""Folders of image files, nested or flat, with links and hidden files; sub-folders as classes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ptq4vit_fx.data.classes import numbers_of
from ptq4vit_fx.data.image_files import IMAGE_SUFFIXES
from ptq4vit_fx.data.pictures import Images
from ptq4vit_fx.errors import PTQError, failure

#: Folders that programs leave behind, like all whose name starts with a dot.
HIDDEN = frozenset(["__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information"])

#: Which folder it is, whatever links lead to it: its device and its number there.
Identity = tuple[int, int]


def visible(name: str) -> bool:
    """Return whether a name in a folder is the user's: neither hidden nor left behind by a program."""
    return not name.startswith(".") and name not in HIDDEN


def is_image(name: str) -> bool:
    """Return whether a file has the name of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Contents:
    """What is in a folder, at any depth: images in the order of their paths, and other files.

    folders: names of the folders in it. Of what is hidden, or was left behind by a program, there is nothing here.
    """

    images: tuple[Path, ...]
    folders: tuple[str, ...]
    others: tuple[Path, ...]


def contents(folder: Path, *, per_subfolder: bool = False) -> Contents:
    """List a folder once; links are followed, cycles are not.

    A folder that is there twice, through a link, is read once, or, per_subfolder, once in every sub-folder. What has
    the name of an image and is none, or is no file, is listed: `opened` says what it is. Raises PTQError on a folder
    that cannot be read.
    """
    identity, top, files = _listed(folder)
    seen = {identity}
    for inner in top:
        files += _walk(inner, {identity} if per_subfolder else seen)
    files.sort(key=lambda path: path.split(os.sep))
    images: list[Path] = []
    others: list[Path] = []
    for path in files:
        (images if is_image(path) else others).append(Path(path))
    return Contents(tuple(images), tuple(os.path.basename(path) for path in top), tuple(others))


def _walk(folder: str, seen: set[Identity]) -> Iterator[str]:
    """Yield the files in a folder, at any depth, but not those of a folder that was seen."""
    waiting = [folder]
    while waiting:
        identity, folders, files = _listed(Path(waiting.pop()), seen)
        seen.add(identity)
        waiting += reversed(folders)
        yield from files


def _listed(folder: Path, seen: Collection[Identity] = ()) -> tuple[Identity, list[str], list[str]]:
    """Return which folder it is, and the paths of the folders and of what else is visible in it, ordered by name.

    Of one that was seen nothing is listed.
    """
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            return identity, [], []
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if visible(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        do = "give yourself the right to read it, or leave it out"
        raise failure("read images", str(folder), expected="a readable folder", got=str(error), do=do) from error
    folders = [entry.path for entry in entries if _is_folder(entry)]
    inner = set(folders)
    return identity, folders, [entry.path for entry in entries if entry.path not in inner]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where one may not look
        return False


def list_images(folder: Path, *, labelled: bool = False) -> Images:
    """List the images of a folder, nested or flat, in the order of their paths.

    Links are followed; hidden files and folders and what programs leave behind are passed over. labelled: only images
    in sub-folders count. All sub-folders, empty ones too, are the classes, in the order of their names, as in
    torchvision's ImageFolder; if all names are numbers, the numbers themselves. Raises PTQError if the folder is
    missing or holds no image.
    """
    if not os.path.isdir(folder):
        raise no_images(folder, "no such folder", labelled=labelled)
    return images_of(contents(folder, per_subfolder=labelled), folder, labelled=labelled)


def images_of(found: Contents, folder: Path, *, labelled: bool = False) -> Images:
    """Return the images of a folder that was listed, per sub-folder where they are labelled; see `list_images`."""
    paths = [path for path in found.images if not labelled or path.parent != folder]
    if not paths:
        others = [path.name for path in (*found.others, *found.images)]
        got = f"{len(others)} other files, such as {others[0]}" if others else "an empty folder"
        raise no_images(folder, got, labelled=labelled)
    if not labelled:
        return Images(tuple(paths))
    depth = len(folder.parts)
    labels = numbers_of([path.parts[depth] for path in paths], found.folders, str(folder))
    return Images(tuple(paths), labels, found.folders)


def no_images(folder: Path, got: str, *, labelled: bool) -> PTQError:
    """Build the error of a folder without images."""
    do = "pass a folder that holds .jpg or .png files" + (" in one sub-folder per class" if labelled else "")
    expected = "one image or more" if os.path.isdir(folder) else "a folder of images"
    return failure("read images", str(folder), expected=expected, got=got, do=do)
