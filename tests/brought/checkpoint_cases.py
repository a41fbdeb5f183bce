"""Checkpoint files as training leaves them: entries, prefixes, other classes in them, other models, other files."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from brought import brought
from brought.command import SIZE, VIT, command
from brought.pipeline import vit
from ptq4vit_fx.tools.named.from_timm import load_timm
from ptq4vit_fx.tools.named.model import Asked

State = dict[str, Tensor]


def state(**arguments: Any) -> State:
    return {key: value.clone() for key, value in vit(**arguments).state_dict().items()}


def load(
    content: Any, *, name: str = "c.pth", save: Callable[[Any, Path], Any] = torch.save, **entry: Any
) -> list[str]:
    """Load a checkpoint that holds the ViT's weights; return what is said of it."""
    with tempfile.TemporaryDirectory() as folder:
        save(content, Path(folder) / name)
        arguments = tuple(f"{key}={value}" for key, value in SIZE.items())
        model = load_timm(Asked("vit_tiny_patch16_224", Path(folder) / name, arguments=arguments, **entry))
    right = state()
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, right[key].half().float()) or torch.equal(value, right[key]), key
    return list(model.said)


def written(content: bytes, name: str) -> None:
    load(content, name=name, save=lambda data, path: path.write_bytes(data))


def prefixed(prefix: str) -> State:
    return {prefix + key: value for key, value in state().items()}


def halved() -> State:
    return {key: value * 0.5 for key, value in state().items()}


class Settings(dict[str, int]):
    """A class of one's own, as the arguments of a training are."""


class Slotted:
    __slots__ = ("rate",)

    def __init__(self, rate: float) -> None:
        self.rate = rate


@brought("file", "weights in an entry, deeper in, beside an optimizer, in half precision", quick=True)
def entries() -> None:
    optimizer = torch.optim.AdamW(vit().parameters())
    for key in ("state_dict", "model", "model_state_dict", "net", "params", "module"):
        assert load({key: state(), "optimizer": optimizer.state_dict(), "epoch": 3}) == []
    assert load({"model": {"state_dict": OrderedDict(state())}}) == []
    assert load({"model": {key: value.half() for key, value in state().items()}}) == []
    assert load({key: value.half() for key, value in state().items()}, name="c.safetensors", save=save_file) == []
    assert load(state(), name="renamed.bin", save=save_file) == []


@brought("file", "prefixes of compiled, parallel and wrapped models", quick=True)
def prefixes() -> None:
    for prefix in ("_orig_mod.", "module.", "model.", "backbone.", "ema_model.module.", "module._orig_mod.", "a.b.c."):
        left = prefix.replace("_orig_mod.", "")
        said = load({"state_dict": prefixed(prefix) | ({"criterion.weight": torch.ones(3)} if left else {})})
        assert said == ([f"weights: {left!r} is left out of its keys"] if left else [])
    inner = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state().items()}
    assert load(inner) == []
    split = {key if key.startswith("head") else f"backbone.{key}": value for key, value in state().items()}
    load(split)


@brought("file", "averaged and plain weights side by side", quick=True)
def averaged() -> None:
    for key in ("state_dict_ema", "model_ema", "ema", "teacher"):
        (line,) = load({"state_dict": halved(), key: state()})
        assert line == f"weights: {key} is taken, not state_dict (--weights-entry chooses)"
    assert load({"state_dict": state(), "state_dict_ema": halved()}, entry="state_dict") == []
    assert load({"state_dict_ema": state()}) == []


@brought("file", "averaged weights asked for, or not", quick=True)
def averaged_or_not() -> None:
    both = {"model": state(), "model_ema": state(), "args": argparse.Namespace(rate=1)}
    assert load(both) == ["weights: model_ema is taken, not model (--weights-entry chooses)"]
    assert load(both | {"model": halved()}, ema=True) == []
    assert load(both | {"model_ema": halved()}, ema=False) == []
    assert load({"state_dict": state()}, ema=False) == []
    beside = prefixed("model.") | {f"ema_model.{key}": value for key, value in state().items()}
    (line,) = load({"state_dict": {**beside, **{k: v * 0.5 for k, v in beside.items() if k.startswith("model.")}}})
    assert line.startswith("weights: state_dict.ema_model is taken, not state_dict.model (--weights-entry chooses); ")
    load({"state_dict": beside}, ema=False)
    few = {key: value for key, value in state().items() if key.startswith("head")}
    assert load({"model": state(), "model_ema": few}) == ["weights: model_ema is not taken"]
    load({"state_dict": halved(), "callbacks": {"EMACallback": state()}})


@brought("file", "averaged weights asked for where there are none", refused="--ema: expected an entry of averaged weig")
def no_averaged() -> None:
    load({"model": state()}, ema=True)


@brought(
    "file", "other weights asked for than averaged ones", refused="--no-ema: expected weights that are not averaged"
)
def only_averaged() -> None:
    load({"model_ema": state()}, ema=False)


def sharded(content: State, index: Path, **changes: Any) -> None:
    """Save weights in two shards beside an index."""
    halves = [dict(list(content.items())[i::2]) for i in range(2)]
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for half, name in zip(halves, names, strict=True):
        save_file(half, index.parent / name)
    found = {key: name for half, name in zip(halves, names, strict=True) for key in half}
    index.write_text(json.dumps({"metadata": {}, "weight_map": found | changes}))


@brought("file", "shards: their index, and the folder of all", quick=True)
def shards() -> None:
    load(prefixed("model."), name="model.safetensors.index.json", save=sharded)
    with tempfile.TemporaryDirectory() as name:
        sharded(state(), Path(name) / "model.safetensors.index.json")
        load(None, name="folder", save=lambda content, path: path.symlink_to(name))
    with tempfile.TemporaryDirectory() as name:
        torch.save({"state_dict": state()}, Path(name) / "last.ckpt")
        (Path(name) / "notes.txt").write_text("no weights")
        load(None, name="folder", save=lambda content, path: path.symlink_to(name))


@brought("file", "an index of shards that are elsewhere", refused="names of files beside it, got '../x.safetensors'")
def shards_elsewhere() -> None:
    outside = {"norm.weight": "../x.safetensors"}
    load(state(), name="model.safetensors.index.json", save=lambda x, path: sharded(x, path, **outside))


@brought("file", "an index of a shard that is missing", refused="expected its shards beside it, got no x.safetensors")
def shards_missing() -> None:
    lost = {"norm.weight": "x.safetensors"}
    load(state(), name="model.safetensors.index.json", save=lambda x, path: sharded(x, path, **lost))


@brought(
    "file", "weights of another project that timm translates: the mask token of DINO, a head that is not asked for"
)
def translated() -> None:
    assert load(state() | {"mask_token": torch.zeros(1, 48)}) == ["weights: left out: mask_token"]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(prefixed("module."), Path(folder) / "c.pth")
        arguments = (*(f"{key}={value}" for key, value in SIZE.items() if key != "num_classes"), "num_classes=0")
        model = load_timm(Asked("vit_tiny_patch16_224", Path(folder) / "c.pth", arguments=arguments))
    assert "head.weight" not in model.network.state_dict()
    assert list(model.said) == ["weights: 'module.' is left out of its keys; left out: head.weight, head.bias"]


@brought("file", "the arguments of a training: namespaces, paths, NumPy's numbers, classes of one's own", quick=True)
def other_classes() -> None:
    settings = argparse.Namespace(rate=1e-3, output=Path("x"), sizes=[1, 2])
    mine = [settings, np.float64(3), defaultdict(int, a=1), Settings(a=1), Slotted(1.0), np.arange(3)]
    for content in mine:
        load({"model": state(), "args": content})
    old = lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False)  # noqa: E731
    load({"model": state(), "args": settings}, save=old)


class Dangerous:
    def __reduce__(self) -> Any:
        return (eval, ("open('/tmp/executed', 'w')",))


@brought("file", "a checkpoint that would run code: it does not")
def dangerous() -> None:
    load({"model": state(), "args": Dangerous()})
    assert not Path("/tmp/executed").exists()


@brought(
    "file", "a whole pickled model", refused="got a whole pickled object of class timm.models.vision_transformer.V"
)
def whole_model() -> None:
    load(vit())


@brought("file", "a TorchScript archive", refused="got a TorchScript archive; save the state dict of the module")
def scripted() -> None:
    load(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), save=lambda module, path: module.save(str(path)))


@brought("file", "another number of classes", refused="2 of another shape: head.weight (9, 48) instead of (7, 48), hea")
def other_classes_count() -> None:
    load(state(num_classes=9))


@brought("file", "another number of classes: what to pass", refused="; pass --model-arg num_classes=9")
def other_classes_advice() -> None:
    load(state(num_classes=9))


@brought("file", "another image size: what to pass", refused="; pass --model-arg img_size=64", quick=True)
def other_image_size() -> None:
    load(state(img_size=64))


@brought("file", "other channels: what to pass", refused="; pass --model-arg in_chans=1")
def other_channels() -> None:
    load(state(in_chans=1))


@brought("file", "another depth: what to pass", refused="; pass --model-arg depth=3")
def other_depth() -> None:
    load(state(depth=3))


@brought("file", "another width", refused="cls_token (1, 1, 96) instead of (1, 1, 48), pos_embed")
def other_width() -> None:
    load(state(embed_dim=96))


@brought(
    "file", "another architecture", refused="got keys of another one: encoder.0.weight, encoder.1.weight, encoder.2.we"
)
def other_architecture() -> None:
    load({f"encoder.{number}.weight": torch.ones(2) for number in range(9)})


@brought(
    "file", "weights that miss some", refused="got 1 missing: norm.bias; 1 not in the model: extra; pass the check"
)
def missing_weight() -> None:
    content = state() | {"extra": torch.ones(1)}
    del content["norm.bias"]
    load(content)


@brought("file", "integer codes in place of weights", refused="1 integers: blocks.0.attn.qkv.weight")
def integer_codes() -> None:
    load(state() | {"blocks.0.attn.qkv.weight": torch.ones(144, 48, dtype=torch.int8)})


@brought("file", "an entry that the file has not", refused="--weights-entry: expected one of state_dict, got 'ema'")
def unknown_entry() -> None:
    load({"state_dict": state()}, entry="ema")


@brought("file", "an empty file", refused="got an empty file; copy or download it again")
def empty_file() -> None:
    written(b"", "c.pth")


@brought("file", "a pointer of Git LFS", refused="got a pointer of Git LFS; fetch the file itself")
def lfs_pointer() -> None:
    written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "c.safetensors")


@brought("file", "a web page in place of the download", refused="got a web page; download the file itself")
def web_page() -> None:
    written(b"\n<!DOCTYPE html><html></html>", "c.pth")


@brought("file", "a checkpoint cut off", refused="got a damaged or truncated file", quick=True)
def truncated() -> None:
    def cut(content: Any, path: Path) -> None:
        torch.save(content, path)
        path.write_bytes(path.read_bytes()[:5000])

    load({"model": state()}, save=cut)


@brought("file", "safetensors cut off", refused="got a damaged or truncated file")
def truncated_safetensors() -> None:
    def cut(content: Any, path: Path) -> None:
        save_file(content, path)
        path.write_bytes(path.read_bytes()[:50000])

    load(state(), name="c.safetensors", save=cut)


@brought("file", "an ONNX file as weights", refused="got an ONNX file; pass the checkpoint that it was exported from")
def onnx_file() -> None:
    written(b"\x08\x08", "c.onnx")


@brought("file", "arrays of NumPy as weights", refused="got arrays of NumPy; save them as safetensors")
def numpy_file() -> None:
    load(state(), name="c.npz", save=lambda content, path: np.savez(path, **{k: v.numpy() for k, v in content.items()}))


@brought("file", "an averaged checkpoint with a prefix on the command line", quick=True)
def command_line() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        torch.save(
            {"state_dict": halved(), "state_dict_ema": prefixed("module."), "args": Settings(a=1)}, root / "c.pth"
        )
        (root / "images").mkdir()
        for number in range(4):
            Image.new("RGB", (40, 40), (60 * number, 128, 9)).save(root / "images" / f"{number}.png")
        options = ["--weights", root / "c.pth", "--data", root / "images", "--out", root / "m.onnx"]
        text = command("quantize", *VIT, *options)
        assert "weights: state_dict_ema is taken, not state_dict" in text
