"""Models of torchvision, `torchvision:vit_b_16`: its default weights, their preprocessing and their classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ptq4vit_fx.data.preprocessing import channels_of
from ptq4vit_fx.errors import failure, near_names, unknown_name
from ptq4vit_fx.tools.checkpoint_files import only_weights
from ptq4vit_fx.tools.models import parse_arguments
from ptq4vit_fx.tools.named.model import (
    CREATE,
    Asked,
    NamedModel,
    crop_share,
    guessed_preprocessing,
    made_by_others,
    side_of,
    with_weights,
)


def load_torchvision(asked: Asked) -> NamedModel:
    """Return a classification model of torchvision with its default weights, or with those of a checkpoint.

    arguments: of the model; `weights=IMAGENET1K_SWAG_E2E_V1` chooses among its weights. Raises PTQError on an unknown
    name (with near ones), arguments that it does not take, and weights that cannot be downloaded or do not fit.
    """
    import torchvision

    name = asked.name.partition(":")[2]
    models = torchvision.models.list_models(module=torchvision.models)
    if name not in models:
        do = f"did you mean torchvision:{near_names(name, models, 3)}?"
        raise failure(
            CREATE, asked.name, expected="a classification model of torchvision", got="an unknown name", do=do
        )
    arguments = parse_arguments(asked.arguments)
    known = {entry.name: entry for entry in torchvision.models.get_model_weights(name)}
    chosen = _weights(
        arguments.pop("weights", "DEFAULT"), known, torchvision.models.get_model_weights(name), asked.name
    )
    taken = chosen if asked.pretrained and asked.weights is None else None
    do = "check --model-arg, or pass --weights FILE with a local checkpoint"
    with made_by_others(asked.name, expected="a model with its weights", do=do), only_weights():
        network: nn.Module = torchvision.models.get_model(name, weights=taken, **arguments)
    said = with_weights(network, asked)
    if taken is not None:
        said = (*said, f"weights: {taken} of torchvision")
    categories = tuple(map(str, chosen.meta.get("categories", ()))) if chosen is not None else ()
    labels = categories if taken is not None and categories else None
    return NamedModel(network.eval(), _preprocessing(network, chosen, asked.name), labels, None, said)


def _weights(wanted: Any, known: dict[str, Any], all_of_them: Any, name: str) -> Any:
    """Return an entry of a model's weights, None of a model that has none; raises PTQError on an unknown one."""
    if wanted in (None, "DEFAULT"):
        return all_of_them.DEFAULT if known and wanted else None
    if wanted not in known:
        raise unknown_name(CREATE, f"{name}: --model-arg weights", str(wanted), known)
    return known[wanted]


def _preprocessing(network: nn.Module, weights: Any, name: str) -> dict[str, Any]:
    """Return the transforms of torchvision's weights as timm's data config, at the size that the network says."""
    transforms: Any = None if weights is None else weights.transforms()
    if not all(hasattr(transforms, entry) for entry in ("crop_size", "resize_size", "mean", "std", "interpolation")):
        return guessed_preprocessing(network, name, "check that it is what the model was trained with")
    (crop, *_), (resize, *_) = transforms.crop_size, transforms.resize_size
    height, width = side_of(network) or (crop, crop)
    return {
        "input_size": (channels_of(network), height, width),
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
        "interpolation": transforms.interpolation.value,
        "crop_pct": crop_share(crop, resize),
        "crop_mode": "center",
    }
