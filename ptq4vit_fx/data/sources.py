"""What `--data` may be: a folder of images, a list of them, arrays, an archive, tables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptq4vit_fx.data.archives import TARS, open_tar, open_tars, open_zip
from ptq4vit_fx.data.arrays import open_array, open_arrays
from ptq4vit_fx.data.classes import DIGITS
from ptq4vit_fx.data.folders import Contents, contents, images_of, is_image, no_images
from ptq4vit_fx.data.listings import open_list
from ptq4vit_fx.data.pictures import Images
from ptq4vit_fx.data.tables import open_table, open_tables
from ptq4vit_fx.errors import failure, foreign, some_names, unknown_name
from ptq4vit_fx.files import check_readable, not_a_file
from ptq4vit_fx.inputs.records import Place, read_json

KINDS = "a folder of images, a list of them (.txt), .npz, .npy, .zip, .tar, .parquet or a folder of `datasets`"
READERS: dict[str, Callable[..., Images]] = {
    **{".txt": open_list, ".npy": open_array, ".npz": open_arrays, ".zip": open_zip},
    **{".parquet": open_table, ".arrow": open_table, **dict.fromkeys(TARS, open_tar)},
}
#: Kinds with a part that one may name behind a colon.
WITH_ENTRIES = (".npz", ".parquet", ".arrow")
#: A file of one split of a data set, as the Hugging Face hub names them.
SHARD = re.compile(r"(.+?)-[0-9]{5}-of-[0-9]{5}.*")


def open_images(data: Path, *, labelled: bool = False) -> Images:
    """Return the images that a path means, without reading them; `FILE:NAME` is an array, a column or a split in it.

    labelled: with the class number of each. Raises PTQError on what is none of KINDS, is damaged, or holds no image,
    and, labelled, on images without class numbers.
    """
    path, entry = _split(data)
    if os.path.isdir(path):
        images = _folder(path, entry, labelled=labelled)
    else:
        reader = READERS.get(path.suffix.lower())
        if reader is None or not_a_file(path):
            raise _refusal(path)
        check_readable(path, "read images", KINDS)
        images = reader(path, entry=entry, labelled=labelled)
    if labelled:
        _check_labels(images, data)
    return images


def _split(data: Path) -> tuple[Path, str | None]:
    """Return a path, and what it names in it."""
    name, colon, entry = str(data).rpartition(":")
    there = colon and entry and not os.path.lexists(data)
    if there and (os.path.isdir(name) or os.path.splitext(name)[1].lower() in WITH_ENTRIES):
        return Path(name), entry
    return data, None


def _folder(folder: Path, entry: str | None, *, labelled: bool) -> Images:
    """Return the images of a folder, or of the tables or archives in it, where it holds no images."""
    if os.path.isfile(folder / "dataset_dict.json"):
        return _folder(_one_split(folder, entry), None, labelled=labelled)
    if os.path.isfile(folder / "state.json"):
        return open_tables(folder, _saved_files(folder), labelled=labelled)
    found = contents(folder, per_subfolder=labelled)
    if not found.images:
        tables = _of_kind(found, (".parquet",))
        if tables:
            return open_tables(folder, _one_of(folder, tables, entry), labelled=labelled)
        tars = _of_kind(found, tuple(suffix for suffix in TARS if suffix.startswith(".t")))
        if tars:
            return open_tars(folder, _one_of(folder, tars, entry), labelled=labelled)
    if entry is not None:
        do = f"pass {folder}"
        raise failure("read images", f"{folder}:{entry}", expected="a folder of splits", got="none of them", do=do)
    return images_of(found, folder, labelled=labelled)


def _of_kind(found: Contents, suffixes: tuple[str, ...]) -> list[Path]:
    return [path for path in found.others if path.name.lower().endswith(suffixes)]


def _one_of(folder: Path, files: list[Path], entry: str | None) -> list[Path]:
    """Return the files of the only split, or of the one that is named."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        match = SHARD.fullmatch(path.name)
        splits.setdefault(match[1] if match else "", []).append(path)
    if entry is not None:
        if entry not in splits:
            raise unknown_name("read images", str(folder), entry, splits)
        return splits[entry]
    if len(splits) > 1:
        do = f"name it: {folder}:{next(iter(splits))}"
        raise failure("read images", str(folder), expected="files of one split", got=some_names(splits), do=do)
    return files


def _one_split(folder: Path, entry: str | None) -> Path:
    """Return the folder of the only split of a DatasetDict, or of the one that is named."""
    splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
    if entry is not None and entry not in splits:
        raise unknown_name("read images", str(folder), entry, splits)
    if entry is None and len(splits) != 1:
        do = f"pass {folder / splits[0]}" if splits else "save it again"
        raise failure("read images", str(folder), expected="one split", got=some_names(splits) or "none", do=do)
    return folder / (entry or splits[0])


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of a data set of `save_to_disk`; raises PTQError on a state that names none in this folder."""
    place = Place("read images", str(folder / "state.json"), do="save the data set again")
    check_readable(folder / "state.json", "read images", "the state of a data set")
    with foreign("read images", str(folder / "state.json"), expected="text in UTF-8", do=place.do):
        said: Any = read_json((folder / "state.json").read_text(encoding="utf-8"), place)
    files = said.get("_data_files") if isinstance(said, dict) else None
    names = [entry.get("filename") for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise place.at("_data_files").refusal("files of this folder", repr(names[:1]))
    return [check_readable(folder / str(name), "read images", "a file of the data set") for name in names]


def _check_labels(images: Images, data: Path) -> None:
    numbers = images.labels
    if not len(numbers):
        do = "pass images with labels: one sub-folder per class, a number behind each line, labels beside the arrays"
        raise failure("read images", str(data), expected="a class number for each image", got="none", do=do)
    if min(numbers) < 0 or max(numbers) >= 10**DIGITS:
        got, do = f"{min(numbers)} to {max(numbers)}", "pass a split that is labelled"
        raise failure("read images", str(data), expected="class numbers of 0 or more", got=got, do=do)


def _refusal(path: Path) -> Exception:
    """Build the error of what is nothing that images are read from."""
    suffix = path.suffix.lower()
    if not os.path.exists(path):
        return no_images(path, "no such folder" if suffix not in READERS else "no such file", labelled=False)
    got, do = not_a_file(path) or "a file", "pass a folder that holds .jpg or .png files"
    if suffix in {".7z", ".rar", ".zst"}:
        got, do = "an archive", "unpack it and pass the folder"
    elif suffix in {".pt", ".pth", ".safetensors", ".h5", ".hdf5", ".pkl"}:
        got, do = "a file of arrays", "save the images with numpy.savez, or pass them to ptq4vit_fx.quantize in Python"
    elif is_image(path.name):
        do = "pass the folder that holds it"
    return failure("read images", str(path), expected=KINDS, got=got, do=do)
