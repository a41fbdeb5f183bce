"""Weights out of checkpoint files as training leaves them: which of them are taken, and what does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptq4vit_fx.errors import failure, some_names, unknown_name
from ptq4vit_fx.tools.checkpoint_entries import Convert, Entry, converted, entries_of, fits
from ptq4vit_fx.tools.checkpoint_files import EXPECTED, read_checkpoint

DEFAULT_ADVICE = "pass the checkpoint of this model, and --model-arg for its size and classes"


def load_weights(
    model: nn.Module,
    path: Path,
    entry: str | None = None,
    *,
    ema: bool | None = None,
    convert: Convert | None = None,
) -> str:
    """Load a checkpoint into a model; return a line that says what was taken, "" for a plain state dict.

    path: a safetensors or pth file, an index of shards, or a folder of either. The state dict may be an entry of the
    file, at any depth, and its keys may have a prefix (`module.`, `_orig_mod.`, `model.`, ...). Of several that fit the
    averaged one (EMA) is taken, as timm does, or `entry`; ema: that one alone, or none of them. convert: makes the
    model's names of another project's, where the names do not fit. Objects of other classes in the file are never
    built. Half weights become float32. Raises PTQError on a file of another kind, and on weights that are missing, left
    over or of another shape, with the --model-arg that would help.
    """
    own = model.state_dict()
    found = entries_of(read_checkpoint(path), own)
    if not found:
        got = "a file without named tensors"
        do = 'save one: torch.save(model.state_dict(), "weights.pth")'
        raise failure("load weights", str(path), expected=EXPECTED, got=got, do=do)
    if entry is not None and entry not in {one.name for one in found}:
        raise unknown_name("load weights", "--weights-entry", entry, [one.name for one in found])
    asked = [one for one in found if entry in (None, one.name)]
    if ema is not None:
        asked = _of_that_kind(path, asked, own, ema=ema)
    most = max(one.shared(own) for one in asked)
    equal = [one for one in asked if one.shared(own) == most]
    taken = next((one for one in equal if one.averaged), equal[0])
    if convert is not None and not fits(taken.state, own) and not _differing(taken, own):
        in_turn = sorted(asked, key=lambda one: not one.averaged)
        conversions = [done for one in in_turn if (done := converted(one, own, convert)) is not None]
        equal = conversions or equal
        taken = equal[0] if conversions else taken
    _check_fit(path, model, own, taken.state)
    state = taken.state
    model.load_state_dict({key: state[key].float() if state[key].is_floating_point() else state[key] for key in own})
    return _said(taken, equal, asked, own)


def _said(taken: Entry, equal: list[Entry], asked: list[Entry], own: Mapping[str, Tensor]) -> str:
    """Return what was taken of what else would have fitted; averaged weights are never passed over in silence."""
    before = next(one for one in asked if one.name == taken.name)
    others = [one.name for one in equal if one is not taken]
    said = [f"{taken.name} is taken, not {', '.join(others)} (--weights-entry chooses)"] if others else []
    passed = [one.name for one in asked if one.averaged and one.shared(own) and one.name not in (taken.name, *others)]
    said += [f"{', '.join(passed)} is not taken"] if passed and not taken.averaged else []
    said += [f"{taken.prefix!r} is left out of its keys"] if taken.prefix else []
    if own.keys() < before.state.keys():
        said.append(f"left out: {some_names(key for key in before.state if key not in own)}")
    elif not own.keys() <= before.state.keys():
        said.append("its names are translated into the model's")
    return f"weights: {'; '.join(said)}" if said else ""


def _of_that_kind(path: Path, found: list[Entry], own: Mapping[str, Tensor], *, ema: bool) -> list[Entry]:
    """Return the entries that are averaged, or those that are not; raises PTQError if there is none of this model."""
    some = any(one.shared(own) for one in found)
    kept = [one for one in found if one.averaged == ema and (one.shared(own) or not some)]
    if not kept:
        option, what = (
            ("--ema", "an entry of averaged weights") if ema else ("--no-ema", "weights that are not averaged")
        )
        do = f"leave {option} out, or pass another file"
        got = f"{some_names(one.name for one in found)} alone"
        raise failure("load weights", f"{path}: {option}", expected=what, got=got, do=do)
    return kept


def _differing(entry: Entry, own: Mapping[str, Tensor]) -> bool:
    """Return whether weights of the model's names have other shapes: no other name is the matter then."""
    return any(key in own and x.shape != own[key].shape for key, x in entry.state.items())


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
