"""Weights out of checkpoint files as training leaves them: which entry, which prefix, and what does not fit."""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ptq4vit_fx.errors import LONGEST_REASON, PTQError, failure, reason_of, some_names, unknown_name
from ptq4vit_fx.files import not_a_file
from ptq4vit_fx.inputs.sizes import check_memory

EXPECTED = "a state dict of this model"
DEFAULT_ADVICE = "pass the checkpoint of this model, and --model-arg for its size and classes"

#: Wrappers that write their own name into the middle of a key.
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")

#: Entries that hold averaged weights, which are those that were validated; timm prefers them too.
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|teacher|averaged)(?![a-z])")

#: A file that says that it unpacks to more than so many times its size is a bomb: torch.save packs nothing.
LARGEST_EXPANSION = 20
#: Mappings in a checkpoint; one may hold itself, many times.
MOST_MAPPINGS = 1000

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


def load_weights(model: nn.Module, path: Path, entry: str | None = None) -> str:
    """Load a safetensors or pth file into a model; return a line that says what was taken, "" for a plain state dict.

    The state dict may be an entry of the file, at any depth, and its keys may have a prefix (`module.`, `_orig_mod.`,
    `model.`, ...). Of several that fit the averaged one (EMA) is taken, as timm does, or `entry`. Objects of other
    classes in the file are never built. Half weights become float32. Raises PTQError on a file of another kind, and on
    weights that are missing, left over or of another shape, with the --model-arg that would help.
    """
    found = dict(_state_dicts(read_checkpoint(path)))
    if not found:
        got = "a file without named tensors"
        do = 'save one: torch.save(model.state_dict(), "weights.pth")'
        raise failure("load weights", str(path), expected=EXPECTED, got=got, do=do)
    if entry is not None and entry not in found:
        raise unknown_name("load weights", "--weights-entry", entry, found)
    own = model.state_dict()
    fitting = {name: _without_prefix(state, own) for name, state in found.items() if entry in (None, name)}
    shared = {name: len(state.keys() & own.keys()) for name, (_, state) in fitting.items()}
    equal = [name for name in fitting if shared[name] == max(shared.values())]
    taken = next((name for name in equal if AVERAGED.search(name.lower())), equal[0])
    prefix, state = fitting[taken]
    _check_fit(path, model, own, state)
    model.load_state_dict({key: state[key].float() if state[key].is_floating_point() else state[key] for key in own})
    others = [name for name in equal if name != taken]
    said = [f"{taken} is taken, not {', '.join(others)} (--weights-entry chooses)"] if others else []
    said += [f"{prefix!r} is left out of its keys"] if prefix else []
    return f"weights: {'; '.join(said)}" if said else ""


def read_checkpoint(path: Path) -> Any:
    """Return what a file holds, objects of unknown classes as stand-ins. Raises PTQError on a file of another kind."""
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


def _state_dicts(value: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every mapping of tensors by name in a checkpoint, with the keys that lead to it.

    The first MOST_MAPPINGS are looked at. Only tensors that hold their values count: others cannot become weights.
    """
    waiting = [(value, "")]
    for _ in range(MOST_MAPPINGS):
        mapping, path = waiting.pop()
        named = {key: x for key, x in mapping.items() if isinstance(key, str)} if isinstance(mapping, Mapping) else {}
        tensors = {key: x for key, x in named.items() if _is_plain(x)}
        if tensors:
            yield path or "the file itself", tensors
        inner = [(x, f"{path}.{key}".removeprefix(".")) for key, x in named.items() if isinstance(x, Mapping)]
        waiting += reversed(inner)
        if not waiting:
            return


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and not (x.is_quantized or x.is_meta or x.is_nested)


def _without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix that most keys have in front of one of the model's, and the state without it.

    Keys without the prefix stay if the model has them (a head beside a backbone), else they are left out.
    """
    plain = {WRAPPERS.sub("", key): x for key, x in state.items()}
    prefixes: Counter[str] = Counter()
    for key in plain:
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        prefixes.update(key[:start] for start in starts if key[start:] in own)
    prefix = max(prefixes, key=lambda p: (prefixes[p], -len(p)), default="")
    if not prefix:
        return "", plain
    beside = {key: x for key, x in plain.items() if key in own}
    return prefix, beside | {key.removeprefix(prefix): x for key, x in plain.items() if key.startswith(prefix)}


def _check_fit(path: Path, model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise PTQError on keys that are missing, left over or of another shape or kind."""
    missing = [key for key in own if key not in state]
    left_over = [key for key in state if key not in own]
    both = [key for key in own if key in state]
    other = [key for key in both if own[key].shape != state[key].shape]
    codes = [key for key in both if own[key].is_floating_point() > state[key].is_floating_point()]
    shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in other]
    parts = {"missing": missing, "not in the model": left_over, "of another shape": shapes, "integers": codes}
    got = "; ".join(f"{len(keys)} {what}: {some_names(keys)}" for what, keys in parts.items() if keys)
    if not got:
        return
    if not both:
        do = f"pass a checkpoint of this architecture, whose keys are like {some_names(list(own))}"
        got = f"keys of another one: {some_names(left_over)}"
        raise failure("load weights", str(path), expected=EXPECTED, got=got, do=do)
    advice = {_model_argument(key, model, own, state) for key in (*missing, *left_over, *other, *codes)}
    do = DEFAULT_ADVICE if "" in advice else f"pass {' '.join(sorted(advice))}"
    raise failure("load weights", str(path), expected=EXPECTED, got=got, do=do)


def _model_argument(key: str, model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Return the --model-arg that makes a key fit, "" if there is none."""
    theirs, mine = state.get(key), own.get(key)
    config = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or "head"
    for head in (heads,) if isinstance(heads, str) else heads:
        if key in (f"{head}.weight", f"{head}.bias"):
            return f"--model-arg num_classes={0 if theirs is None else len(theirs)}"
    block = re.match(r"blocks\.\d+\.", key)
    if block and (theirs is None or mine is None):
        numbers = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
        return f"--model-arg depth={max(numbers) + 1}" if numbers and not _has_key_of_block(key, own, state) else ""
    patches: Any = getattr(model, "patch_embed", None)
    if theirs is None or mine is None or theirs.ndim != mine.ndim:
        return ""
    if key == "patch_embed.proj.weight" and theirs.ndim == 4 and theirs.shape[0] == mine.shape[0]:
        changed = {"in_chans": (theirs.shape[1], mine.shape[1]), "patch_size": (theirs.shape[2], mine.shape[2])}
        return " ".join(f"--model-arg {name}={a}" for name, (a, b) in changed.items() if a != b)
    if key == "pos_embed" and theirs.shape[-1] == mine.shape[-1] and getattr(patches, "grid_size", None):
        side = math.isqrt(theirs.shape[1] - (mine.shape[1] - math.prod(patches.grid_size)))
        return f"--model-arg img_size={side * patches.patch_size[0]}"
    return ""


def _has_key_of_block(key: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    """Return whether both have a block of that number, so that it is not the depth that differs."""
    start = ".".join(key.split(".")[:2]) + "."
    return all(any(name.startswith(start) for name in names) for names in (own, state))
