"""An image processor of transformers as timm's data config: size, crop, interpolation, mean and std."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq4vit_fx.errors import failure
from ptq4vit_fx.tools.named.model import CREATE, crop_share

#: PIL's number of a filter -> its name; what transformers takes where a processor says none.
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
DEFAULT_FILTER = 2
#: ConvNeXt's processor resizes images of this side or more without a crop.
WHOLE_FROM = 384
#: How far a rescale factor may be from 1/255 and mean that.
CLOSE = 1e-6


def preprocessing_of(processor: Mapping[str, Any], name: str, channels: int) -> dict[str, Any]:
    """Return timm's data config of what an image processor says of itself (`to_dict`).

    timm makes 0 to 1 of a pixel and then subtracts and divides, so that whatever the processor's rescaling is stands in
    mean and std. name: of the model, for the PTQError on what no data config says: channels in another order, images
    that are not resized, or padded, or keep their sides' ratio without a crop.
    """
    said = dict(processor)
    problem = _problem(said)
    if problem:
        do = "wrap the model in a forward that takes ordinary images, and name it file.py:Class"
        raise failure(CREATE, f"{name}: image processor", expected="a resize, a crop, a mean", got=problem, do=do)
    size, crop = _sides(said.get("size")), _sides(said.get("crop_size"))
    edge = size.get("shortest_edge")
    resized = (edge, edge) if edge else (size["height"], size["width"])
    mode = "center" if edge else "squash"
    if said.get("do_center_crop") and crop:
        sides = (crop.get("height") or crop["shortest_edge"], crop.get("width") or crop["shortest_edge"])
        share = crop_share(sides[0], resized[0])
    elif edge and "crop_pct" in said:  # ConvNeXt's: the share is of the size that comes out
        sides, share, mode = resized, said["crop_pct"] or 1.0, "center" if edge < WHOLE_FROM else "squash"
        share = crop_share(edge, int(edge / share)) if mode == "center" else 1.0
    else:
        sides, share = resized, 1.0
    mean, std = _normalization(said, channels)
    resample = said.get("resample")
    return {
        "input_size": (channels, *sides),
        "mean": mean,
        "std": std,
        "interpolation": FILTERS[DEFAULT_FILTER if resample is None else int(resample)],
        "crop_pct": share,
        "crop_mode": mode,
    }


def _problem(said: Mapping[str, Any]) -> str:
    """Return what of a processor has no place in a data config, "" if all of it has."""
    size = _sides(said.get("size"))
    if said.get("do_flip_channel_order"):
        return "channels in the order blue, green, red"
    if not said.get("do_resize", True) or not size:
        return "images of any size"
    if said.get("do_pad") and said.get("pad_size") is not None:
        return "images that are padded"
    if "shortest_edge" not in size and not {"height", "width"} <= size.keys():
        return f"a size of {', '.join(size)}"
    if int(said.get("resample") or 0) not in FILTERS:
        return f"the filter {said['resample']}"
    return ""


def _sides(size: Any) -> dict[str, int]:
    """Return a size by the names of its sides; a number is both of them."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {key: int(x) for key, x in size.items() if x} if isinstance(size, Mapping) else {}


def _normalization(said: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std for pixels from 0 to 1 of what a processor does with those from 0 to 255."""
    factor = said.get("rescale_factor") or 1 / 255 if said.get("do_rescale", True) else 1.0
    scale = 255 * float(factor)
    scale = 1.0 if abs(scale - 1) < CLOSE else scale
    shift = 1.0 if said.get("do_rescale", True) and (said.get("rescale_offset") or said.get("offset")) else 0.0
    normalizes = said.get("do_normalize", True)
    mean, std = ((said.get(key) if normalizes else None) for key in ("image_mean", "image_std"))
    means = _per_channel(0.0 if mean is None else mean, channels)
    stds = _per_channel(1.0 if std is None else std, channels)
    return tuple((x + shift) / scale for x in means), tuple(x / scale for x in stds)


def _per_channel(numbers: Any, channels: int) -> list[float]:
    given = [float(x) for x in numbers] if isinstance(numbers, (list, tuple)) else [float(numbers)]
    return given * channels if len(given) == 1 else given
