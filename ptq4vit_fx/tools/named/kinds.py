"""How a model is named, which kind of name that is, and its loader.

| name | what it is |
|---|---|
| `vit_small_patch16_224` (no `/`, no `:`) | a model of timm, whatever folder has that name too |
| `hf-hub:ORG/NAME`, `local-dir:FOLDER` | timm's own, on the hub or in a folder |
| `./FOLDER`, `/FOLDER`, `~/FOLDER`, `ORG/NAME` | Hugging Face: a folder; ORG/NAME the hub, unless that folder is here |
| `torchvision:NAME` | a model of torchvision |
| `FILE.py:NAME`, `PACKAGE.MODULE:NAME` | a class, function or model of the user's own Python, which is run |
"""

from __future__ import annotations

import os
import re
from typing import Literal

from ptq4vit_fx.errors import failure, near_names, quoted
from ptq4vit_fx.files import not_a_file
from ptq4vit_fx.tools.checkpoint_files import INDEX, SUFFIXES
from ptq4vit_fx.tools.named.model import CREATE, Asked, NamedModel

ModelKind = Literal["timm", "huggingface", "torchvision", "python"]
TIMM_SOURCES = ("hf-hub:", "local-dir:")
TORCHVISION = "torchvision:"
#: `package.module:function`, of names that Python has.
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
EXPECTED = "a timm model name, hf-hub:, local-dir: or torchvision: and a name, ORG/NAME, ./FOLDER or file.py:Class"


def kind_of(name: str) -> ModelKind:
    """Return which kind of name this is, by its form alone but for one case: `ORG/NAME` may be a folder that is here.

    Raises PTQError on names of no kind, and on files that are no model.
    """
    if name.startswith(TIMM_SOURCES):
        return "timm"
    if name.startswith(TORCHVISION):
        return "torchvision"
    before, colon, _ = name.partition(".py:")
    if colon or name.endswith(".py") or MODULE.fullmatch(name):
        return "python"
    _check_no_file(name)
    before, colon, after = name.partition(":")
    if colon and not os.path.isdir(name):
        near = near_names(f"{before}:", [*TIMM_SOURCES, TORCHVISION], 1)
        raise failure(CREATE, quoted(name), expected=EXPECTED, got=f"{before}:", do=f"did you mean {near}{after}?")
    if "/" in name or os.sep in name or name in (".", "..", "~"):
        return "huggingface"
    return "timm"


def absolute(name: str) -> str:
    """Return the name with the path in it, if it is one, absolute: `net.py:Net`, a folder, an ONNX file."""
    path, colon, rest = name.partition(":")
    return os.path.abspath(path) + colon + rest if os.path.exists(path) else name


def _check_no_file(name: str) -> None:
    """Raise PTQError on the path of a file, which is no model by itself."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".onnx":
        do = "pass the PyTorch model that it was exported from"
        raise failure(CREATE, quoted(name), expected=EXPECTED, got="an ONNX file", do=do)
    if suffix in SUFFIXES or name.endswith(INDEX):
        do = f"pass the model's name, and --weights {name}"
        raise failure(CREATE, quoted(name), expected=EXPECTED, got="a file of weights", do=do)
    if ("/" in name or os.sep in name) and not not_a_file(name):
        do = "pass the folder that holds it, or file.py:Class"
        raise failure(CREATE, quoted(name), expected=EXPECTED, got="a file", do=do)


def load_model(asked: Asked) -> NamedModel:
    """Return the model of a name. Raises PTQError on names and arguments that do not exist, with near names of the same
    kind, on weights that do not fit or cannot be downloaded, and on what the user's own Python raises.
    """
    kind = kind_of(asked.name)
    if kind == "torchvision":
        from ptq4vit_fx.tools.named.from_torchvision import load_torchvision as load
    elif kind == "huggingface":
        from ptq4vit_fx.tools.named.from_huggingface import load_huggingface as load
    elif kind == "python":
        from ptq4vit_fx.tools.named.from_python import load_python as load
    else:
        from ptq4vit_fx.tools.named.from_timm import load_timm as load
    return load(asked)
