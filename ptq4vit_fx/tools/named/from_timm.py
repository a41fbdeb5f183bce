"""Models of timm: by name, from the hub (`hf-hub:ORG/NAME`), and in a folder that timm wrote (`local-dir:FOLDER`)."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ptq4vit_fx.data.preprocessing import data_config
from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.export.proof.against_float import Kind
from ptq4vit_fx.inputs.records import Place, read_json
from ptq4vit_fx.inputs.sizes import check_memory
from ptq4vit_fx.tools.models import check_name, timm_model, translated
from ptq4vit_fx.tools.named.hub import cache_where_unreachable
from ptq4vit_fx.tools.named.model import CREATE, Asked, NamedModel, with_weights

LOCAL = "local-dir:"
CONFIG = "config.json"


def load_timm(asked: Asked) -> NamedModel:
    """Return a timm model. Raises PTQError as `create_model`, and on a folder that timm did not write."""
    if asked.name.startswith(LOCAL):
        folder = Path(asked.name.removeprefix(LOCAL)).expanduser()
        network = _local(asked.name, folder, asked.arguments)
        asked = replace(asked, weights=asked.weights or folder)  # timm's own reading of a folder may unpickle
    else:
        if ":" not in asked.name:
            check_name(asked.name, CREATE)
        pretrained = asked.pretrained and asked.weights is None
        asks_hub = pretrained or ":" in asked.name
        with cache_where_unreachable(asked.name) if asks_hub else nullcontext():
            network = timm_model(asked.name, asked.arguments, pretrained=pretrained)
    said = with_weights(network, asked, lambda state: translated(state, network))
    kind: Kind | None = "embeddings" if getattr(network, "num_classes", None) == 0 else None
    return NamedModel(network.eval(), data_config(network), _labels(network), kind, said)


def _local(name: str, folder: Path, arguments: tuple[str, ...]) -> nn.Module:
    config = config_of(folder, name)
    if "architecture" not in config:
        do = f"pass it as ./{folder}" if "model_type" in config and not folder.is_absolute() else f"pass {folder}"
        expected, got = "a folder that timm wrote", "one of Hugging Face" if "model_type" in config else "another one"
        raise failure(CREATE, name, expected=expected, got=got, do=do)
    check_name(str(config["architecture"]).partition(".")[0], f"{CREATE}: {folder / CONFIG}")
    return timm_model(f"{LOCAL}{folder}", arguments, pretrained=False)


def config_of(folder: Path, name: str) -> dict[str, Any]:
    """Return what config.json of a folder holds; raises PTQError if there is no folder, no such file or no JSON."""
    path = folder / CONFIG
    if not folder.is_dir():
        parent = folder.parent
        beside = [inner.name for inner in parent.iterdir() if inner.is_dir()] if parent.is_dir() else []
        do = f"did you mean {parent / near_names(folder.name, sorted(beside), 1)}?" if beside else "check the path"
        raise failure(CREATE, name, expected="a folder of a model", got="no such folder", do=do)
    if not path.is_file():
        do = "pass the model's name, and its weights with --weights"
        raise failure(CREATE, name, expected="a folder of a model", got=f"one without {CONFIG}", do=do)
    place = Place(CREATE, str(path), do="copy or download the folder again")
    check_memory(CREATE, str(path), os.path.getsize(path), what="it", do="pass another folder")
    config = read_json(path.read_text(encoding="utf-8", errors="replace"), place)
    if not isinstance(config, dict):
        raise place.refusal("an object", type(config).__name__)
    return config


def _labels(network: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the classes that the configuration of a model holds, if there is one for each."""
    names = (getattr(network, "pretrained_cfg", None) or {}).get("label_names") or ()
    texts = tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()
    return texts if texts and len(texts) == getattr(network, "num_classes", None) else None
