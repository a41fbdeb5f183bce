"""Models of transformers: a folder of `save_pretrained`, or ORG/NAME on the hub. No code of theirs runs, no pickle."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptq4vit_fx.data.preprocessing import channels_of
from ptq4vit_fx.errors import failure, near_names, some_names
from ptq4vit_fx.tools.checkpoint_files import only_weights
from ptq4vit_fx.tools.models import parse_arguments
from ptq4vit_fx.tools.named.from_timm import CONFIG, config_of, load_timm
from ptq4vit_fx.tools.named.hub import cache_where_unreachable
from ptq4vit_fx.tools.named.model import (
    CREATE,
    Asked,
    NamedModel,
    guessed_preprocessing,
    made_by_others,
    with_weights,
)
from ptq4vit_fx.tools.named.processor import preprocessing_of

#: ORG/NAME, and @REVISION behind it.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
CLASSIFIES = "ForImageClassification"
IMAGES = "pixel_values"
#: What takes images alone, of a model that takes text too.
VISION = ("VisionModelWithProjection", "VisionModel")
#: Weights that a backbone was saved without, and that it does without.
POOLER = "pooler."


@dataclass(frozen=True)
class Place:
    """Where a model is: a folder, or an id on the hub with its revision. config: what its config.json holds."""

    path: str
    local: bool
    revision: str | None
    config: dict[str, Any]

    @property
    def advice(self) -> str:
        if self.local:
            return "check the folder, which save_pretrained writes, and --model-arg"
        return "check the name and the connection, or download the folder and pass ./FOLDER"

    def options(self) -> dict[str, Any]:
        """Return what every `from_pretrained` is given."""
        return {"revision": self.revision or "main", "local_files_only": self.local, "trust_remote_code": False}


def load_huggingface(asked: Asked) -> NamedModel:
    """Return a model of transformers with the preprocessing of its image processor and the names of its classes.

    Of a folder that timm wrote, timm's. arguments: entries of its configuration. Raises PTQError if transformers is not
    installed, on a folder or a name that is none, on models that take more than images or whose code is not
    transformers', and on weights that are missing or do not fit.
    """
    place = _place(asked.name)
    if "architecture" in place.config and "model_type" not in place.config:
        return load_timm(replace(asked, name=f"{'local-dir:' if place.local else 'hf-hub:'}{place.path}"))
    if importlib.util.find_spec("transformers") is None:
        do = "pip install 'ptq4vit-fx[hf]'"
        raise failure(CREATE, asked.name, expected="the package transformers", got="none", do=do)
    with nullcontext() if place.local else cache_where_unreachable(asked.name), _quiet(), only_weights():
        with made_by_others(asked.name, expected="a configuration that transformers knows", do=place.advice):
            config = _configuration(place)
        made_of, config = _class(place, config, asked.name)
        _set(config, parse_arguments(asked.arguments), asked.name)
        if asked.weights is None and asked.pretrained:
            with made_by_others(asked.name, expected="a model of transformers with its weights", do=place.advice):
                network, said = _with_its_weights(made_of, config, place, asked.name)
        else:
            with made_by_others(asked.name, expected="a model of transformers", do=place.advice):
                network = made_of(config)
            said = with_weights(network, asked, lambda state: _translated(state, made_of, config))
        preprocessing = _preprocessing(network, place, asked.name)
    labels = _labels(config) if CLASSIFIES in type(network).__name__ else None
    return NamedModel(network.float().eval(), preprocessing, labels, None, said)


def _place(name: str) -> Place:
    """Return where a model is, and its config.json; raises PTQError if it is not there or cannot be downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir() or not HUB_ID.fullmatch(name) or name.startswith((".", "~", "/", os.sep)):
        return Place(str(folder), True, None, config_of(folder, name))
    import huggingface_hub

    path, _, revision = name.partition("@")
    do = "check the name and the connection, or download the folder and pass ./FOLDER"
    with (
        cache_where_unreachable(name),
        made_by_others(name, expected="a model on the hub of Hugging Face, or a folder", do=do),
    ):
        file = huggingface_hub.hf_hub_download(path, CONFIG, revision=revision or None)
    return Place(path, False, revision or None, config_of(Path(file).parent, name))


def _configuration(place: Place) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(place.path, **place.options())


def _class(place: Place, config: Any, name: str) -> tuple[Any, Any]:
    """Return the class of a model and its configuration: the one that was saved, else by what the folder says.

    Of a model that takes images and text (CLIP) it is the part that takes images. Raises PTQError on a model that does
    not take images.
    """
    import transformers

    saved = [getattr(transformers, str(x), None) for x in place.config.get("architectures") or ()]
    found = next((one for one in saved if isinstance(one, type) and issubclass(one, nn.Module)), None)
    if found is None:
        auto = transformers.AutoModelForImageClassification if "id2label" in place.config else transformers.AutoModel
        with made_by_others(name, expected="a model of images", do="pass a model of images"):
            found = auto._model_mapping[type(config)]
            found = found[0] if isinstance(found, (tuple, list)) else found
    if getattr(found, "main_input_name", None) == IMAGES:
        return found, config
    base = found.__name__.removesuffix("Model")
    vision = [getattr(transformers, base + end) for end in VISION if hasattr(transformers, base + end)]
    if vision and hasattr(config, "vision_config"):
        return vision[0], config.vision_config
    got, do = f"{found.__name__}, which takes {getattr(found, 'main_input_name', None)}", "pass a model of images"
    raise failure(CREATE, name, expected="a model that takes images alone", got=got, do=do)


def _set(config: Any, arguments: dict[str, Any], name: str) -> None:
    """Change entries of a configuration; raises PTQError on a name that it has not, and on a value that it refuses."""
    known = [*config.to_dict(), "num_labels"]
    for key, value in arguments.items():
        if key not in known:
            do = f"did you mean {near_names(key, known, 3)}?"
            raise failure(CREATE, f"{name}: --model-arg {key}", expected="an entry of its config", got="none", do=do)
        with made_by_others(f"{name}: --model-arg {key}", expected="a value that it takes", do="check the value"):
            setattr(config, key, value)


def _with_its_weights(made_of: Any, config: Any, place: Place, name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a model with the weights of its folder; raises PTQError if some of the model's are not there.

    A pooler that was not saved, which transformers would fill with random numbers, is left out.
    """
    options = {"config": config, "weights_only": True, "output_loading_info": True, **place.options()}
    network, found = made_of.from_pretrained(place.path, **options)
    said: tuple[str, ...] = ()
    missing = sorted(found["missing_keys"])
    if missing and all(key.startswith(POOLER) or f".{POOLER}" in key for key in missing):
        network, found = made_of.from_pretrained(place.path, add_pooling_layer=False, **options)
        said, missing = ("weights: the pooler is left out, which was not saved",), sorted(found["missing_keys"])
    if missing:
        got = f"none for {some_names(missing)}"
        do = "pass the folder of a trained model, or --weights"
        raise failure(CREATE, name, expected=f"weights of {made_of.__name__}", got=got, do=do)
    left = sorted(found["unexpected_keys"])
    return network, (*said, f"weights: left out: {some_names(left)}") if left else said


def _translated(state: dict[str, Tensor], made_of: Any, config: Any) -> dict[str, Tensor] | None:
    """Return weights by the names of this release of transformers, which have changed; None if they do not fit."""
    try:
        made, found = made_of.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    except Exception:  # noqa: BLE001 - of weights that are another model's it raises anything
        return None
    problems = (found.get("missing_keys"), found.get("mismatched_keys"), found.get("unexpected_keys"))
    return None if any(problems) else dict(made.float().state_dict())


def _preprocessing(network: nn.Module, place: Place, name: str) -> dict[str, Any]:
    """Return the preprocessing of the image processor that was saved with a model, else a guess, with a warning."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(place.path, **place.options())
        said = processor.to_dict()
    except Exception:  # noqa: BLE001 - no such file, or one for another kind of input
        do = "save its image processor there too: processor.save_pretrained(FOLDER)"
        return guessed_preprocessing(network, name, do)
    return preprocessing_of(said, name, channels_of(network))


def _labels(config: Any) -> tuple[str, ...] | None:
    """Return the names of the classes, None where they are the numbers that transformers makes up."""
    names = {int(key): str(label) for key, label in (getattr(config, "id2label", None) or {}).items()}
    listed = tuple(names[number] for number in range(len(names)) if number in names)
    made_up = all(re.fullmatch(r"LABEL_\d+", label) for label in listed)
    return None if made_up or len(listed) != len(names) else listed


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers says of its own accord from the terminal; what goes wrong it raises."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    bars: Any = None
    if importlib.util.find_spec("transformers") is not None:
        bars = importlib.import_module("transformers.utils.logging")
    shown = bars is not None and bars.is_progress_bar_enabled()
    if shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
        logger.setLevel(before)
