"""Checkpoint files as they are: safetensors, torch.save, shards, folders of them; nothing that is in them runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ptq4vit_fx.errors import LONGEST_REASON, PTQError, failure, reason_of, some_names
from ptq4vit_fx.files import not_a_file
from ptq4vit_fx.inputs.records import Place, read_as, read_json
from ptq4vit_fx.inputs.sizes import check_memory

EXPECTED = "a state dict of this model"

#: A file that says that it unpacks to more than so many times its size is a bomb: torch.save packs nothing.
LARGEST_EXPANSION = 20
#: Ends of the names of files of weights.
SUFFIXES = frozenset([".safetensors", ".pth", ".pt", ".bin", ".ckpt"])
#: How Hugging Face's libraries call what a folder holds; an index says in which shard each weight is.
INDEX = ".index.json"
NAMES = ("model.safetensors" + INDEX, "pytorch_model.bin" + INDEX, "model.safetensors", "pytorch_model.bin")

#: Suffixes of files that hold no state dict -> what they are, and what to do.
OTHER_FILES = {
    ".onnx": ("an ONNX file", "pass the checkpoint that it was exported from"),
    ".npz": ("arrays of NumPy", "save them as safetensors, by the names of the model's state dict"),
    ".npy": ("an array of NumPy", "save a state dict"),
    ".h5": ("a file of Keras or HDF5", "convert it to a state dict first"),
    ".keras": ("a file of Keras", "convert it to a state dict first"),
    ".msgpack": ("weights of Flax", "convert them to a state dict first"),
    ".pt2": ("a program of torch.export", "save the state dict of the module that it was made of"),
    ".gguf": ("a GGUF file", "pass the float weights"),
    ".index": ("a TensorFlow checkpoint", "convert it to a state dict first"),
    ".json": ("JSON", "pass the file that holds the weights"),
}


#: Where torch looks for whether a file may hold anything but weights, whatever its caller says.
ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def only_weights() -> Iterator[None]:
    """Let nothing in a file run that a library loads meanwhile: some releases of timm unpickle what they download."""
    before = os.environ.get(ONLY_WEIGHTS)
    os.environ[ONLY_WEIGHTS] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ONLY_WEIGHTS, None)
        else:
            os.environ[ONLY_WEIGHTS] = before


def read_checkpoint(path: Path) -> Any:
    """Return what a file holds, objects of unknown classes as stand-ins; of an index, what its shards hold together.

    A folder is the file in it: an index, `model.safetensors`, `pytorch_model.bin`, or the only file of weights. Raises
    PTQError on a file of another kind.
    """
    path = _file_of(path)
    if path.name.endswith(INDEX) and not not_a_file(path):
        return _from_shards(path)
    try:
        got, do = _other_file(path)
        if not got:
            do = "load it where there is more"
            check_memory("load weights", str(path), path.stat().st_size, what="the file", do=do)
            loaded = dict(load_file(path)) if _is_safetensors(path) else _load(path)
    except PTQError:
        raise
    except Exception as error:
        got = f"a damaged or truncated file ({_reason(error)})"
        do = "copy or download it again, or save the state dict alone: torch.save(model.state_dict(), path)"
        raise failure("load weights", str(path), expected=EXPECTED, got=got, do=do) from error
    if got:
        raise failure("load weights", str(path), expected=EXPECTED, got=got, do=do)
    if isinstance(loaded, StandIn):
        got = f"a whole pickled object of class {type(loaded).origin}"
        do = "save the weights alone where that class is at hand: torch.save(model.state_dict(), path)"
        raise failure("load weights", str(path), expected=EXPECTED, got=got, do=do)
    return loaded


def _file_of(path: Path) -> Path:
    """Return the file of weights in a folder; the path itself if it is none, or holds none or several."""
    if not path.is_dir():
        return path
    named = [path / name for name in NAMES if (path / name).is_file()]
    if not named:
        named = [inner for inner in sorted(path.iterdir()) if inner.suffix.lower() in SUFFIXES and inner.is_file()]
        named = named if len(named) == 1 else []
    return named[0] if named else path


def _from_shards(index: Path) -> dict[str, Any]:
    """Return the weights of every shard that an index names, all of them files beside it.

    Raises PTQError on an index that is none, and on shards that are missing or lack what it says of them.
    """
    place = Place("load weights", str(index), do="copy or download the whole folder again")
    check_memory("load weights", str(index), index.stat().st_size, what="the index", do="pass another file")
    content = read_json(index.read_text(encoding="utf-8", errors="replace"), place)
    if not isinstance(content, dict) or "weight_map" not in content:
        raise place.refusal("an index of shards, with an entry weight_map", "other JSON")
    shard_of: dict[str, str] = read_as(dict[str, str], content["weight_map"], place.at("weight_map"))
    names = sorted(set(shard_of.values()))
    outside = [name for name in names if name in ("", ".", "..") or Path(name).name != name or "\\" in name]
    if outside:
        raise place.refusal("names of files beside it", some_names(map(repr, outside)))
    absent = [name for name in names if not_a_file(index.parent / name)]
    if absent or not names:
        raise place.refusal("its shards beside it", f"no {some_names(absent)}" if absent else "none")
    size = sum((index.parent / name).stat().st_size for name in names)
    check_memory("load weights", str(index), size, what="its shards", do="load them where there is more")
    found: dict[str, Any] = {}
    for name in names:
        shard = read_checkpoint(index.parent / name)
        found |= dict(shard) if isinstance(shard, Mapping) else {}
    lacking = [key for key in shard_of if key not in found]
    if lacking:
        raise place.refusal("the weights that it names in its shards", f"no {some_names(lacking)}")
    return found


def _reason(error: Exception) -> str:
    """Return what is wrong, without torch's advice to load the file in a way that runs what is in it."""
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return lines[0].strip()[:LONGEST_REASON] if lines else reason_of(error)


class StandIn:
    """Stands for an object of a class that is not built: it takes what its constructor is given, and does nothing."""

    origin = ""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class MappingStandIn(StandIn):
    """Stands for a mapping of another class: a plain one."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict[Any, Any]()


def _load(path: Path) -> Any:
    """Return what torch.load gives without building any object but tensors and plain containers."""
    names = ["argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "collections.defaultdict"]
    if zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    for kind in (StandIn, MappingStandIn):
        kinds = {name: StandIn if name.startswith(("numpy.", "_codecs.")) else kind for name in names}
        made: list[Any] = [(type("Made", (base,), {"origin": name}), name) for name, base in kinds.items()]
        try:
            with torch.serialization.safe_globals(made):
                return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, TypeError):
            if kind is MappingStandIn:
                raise
    return None


def _other_file(path: Path) -> tuple[str, str]:
    """Return what a file is that holds no state dict, and what to do; two empty texts if it may hold one."""
    other = not_a_file(path)
    if other:
        return other, "pass the .safetensors or .pth file in it" if other == "a folder" else "check the path"
    start = _start(path)
    if not start:
        return "an empty file", "copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS", "fetch the file itself: git lfs pull"
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page", "download the file itself, not the page that links to it"
    if path.suffix.lower() in OTHER_FILES:
        return OTHER_FILES[path.suffix.lower()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names, unpacked = archive.namelist(), sum(entry.file_size for entry in archive.infolist())
        if unpacked > LARGEST_EXPANSION * path.stat().st_size:
            return f"an archive of {unpacked} bytes in {path.stat().st_size}", "save it again with torch.save"
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript archive", "save the state dict of the module that it was made of"
        if not any(name.endswith("data.pkl") for name in names):
            return f"an archive of {len(names)} files, such as {names[0]}" if names else "an empty archive", "unpack it"
    return "", ""


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or _start(path)[8:9] == b"{"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)
