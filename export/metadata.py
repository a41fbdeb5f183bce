"""What a file of this package says of itself: the keys of its metadata, read and written here. Needs numpy alone."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ptq4vit_fx.inputs.records import Place, read_as, read_json

if TYPE_CHECKING:
    import onnx_ir as ir

#: The plan as JSON (`QuantPlan.to_json`).
PLAN_KEY = "ptq4vit_fx.plan"
#: The recipe's name and the search settings, JSON.
RECIPE_KEY = "ptq4vit_fx.recipe"
#: The version of this package that wrote the file.
VERSION_KEY = "ptq4vit_fx.version"
#: The calibration's fingerprint.
CALIBRATION_KEY = "ptq4vit_fx.calibration"
#: Facts about the calibration and the model's preprocessing, JSON.
PROVENANCE_KEY = "ptq4vit_fx.provenance"
#: The deployment target.
TARGET_KEY = "ptq4vit_fx.target"
#: JSON: name of an output -> the name that it has in the converted model.
OUTPUTS_KEY = "ptq4vit_fx.outputs"
#: The calibrated scales that no initializer holds: JSON, site -> base64 of little-endian float32.
SCALES_KEY = "ptq4vit_fx.scales"
#: What the search measured of every product and site, JSON (`Figures`).
FIGURES_KEY = "ptq4vit_fx.figures"
#: The names of the classes, JSON, in their order; only where they are known.
LABELS_KEY = "ptq4vit_fx.labels"
#: Layout of the images, nhwc or nchw, of a file that takes them as uint8 and scales them itself.
UINT8_KEY = "ptq4vit_fx.uint8_input"
#: Digits of figures: nobody computes with them.
DIGITS = 5


@dataclass(frozen=True)
class Figures:
    """What the search measured; each as in `Calibration`, an infinite signal-to-noise ratio as None."""

    distances: dict[str, tuple[float, float]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    snr: dict[str, float | None] = field(default_factory=dict)


def write_metadata(model: ir.Model, values: Mapping[str, str]) -> None:
    """Make these the metadata of a model, in place, and say who wrote it."""
    model.metadata_props.clear()
    model.metadata_props.update(values)
    model.producer_name, model.producer_version = "ptq4vit_fx", values[VERSION_KEY]


def own_outputs(metadata: Mapping[str, str], operation: str, file: str) -> dict[str, str]:
    """Return output -> its name in the converted model; {} of a file that does not say it.

    operation, file: what reads it, and from where, for the PTQError that any other content of that entry is.
    """
    return cast("dict[str, str]", _entry(metadata, OUTPUTS_KEY, dict[str, str], operation, file))


def encode_scales(scales: NDArray[Any]) -> str:
    """Return float32 scales as text, bit for bit."""
    return base64.b64encode(scales.astype("<f4").tobytes()).decode()


def calibrated_scales(metadata: Mapping[str, str], operation: str, file: str) -> dict[str, NDArray[np.float32]]:
    """Return site -> the calibrated scales, shape (count,), that no initializer of the file holds.

    operation, file: as for `own_outputs`. Raises PTQError on anything else in that entry.
    """
    coded = _entry(metadata, SCALES_KEY, dict[str, str], operation, file)
    scales = {}
    for site, text in coded.items():
        try:
            scales[site] = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
        except ValueError as error:
            place = Place(operation, f"{file}: {SCALES_KEY}").at(site)
            raise place.refusal("float32 numbers in base64", str(error)) from error
    return scales


def provenance(metadata: Mapping[str, str], operation: str, file: str) -> dict[str, Any]:
    """Return the facts about the calibration and the preprocessing, {} of a file that has none.

    operation, file: as for `own_outputs`. Raises PTQError on what is no mapping.
    """
    return cast("dict[str, Any]", _entry(metadata, PROVENANCE_KEY, dict[str, Any], operation, file))


def labels_of(metadata: Mapping[str, str], operation: str, file: str) -> tuple[str, ...]:
    """Return the names of the classes, () of a file that has none. operation, file: as for `own_outputs`."""
    if LABELS_KEY not in metadata:
        return ()
    return cast("tuple[str, ...]", _entry(metadata, LABELS_KEY, tuple[str, ...], operation, file))


def encode_figures(
    distances: Mapping[str, tuple[float, float]], shares: Mapping[str, float], snr: Mapping[str, float]
) -> str:
    """Return the figures of a calibration as JSON, in DIGITS digits."""
    figures = {
        "distances": {name: [_short(before), _short(after)] for name, (before, after) in distances.items()},
        "shares": {name: _short(share) for name, share in shares.items()},
        "snr": {name: _short(ratio) if math.isfinite(ratio) else None for name, ratio in snr.items()},
    }
    return json.dumps(figures)


def _short(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def figures_of(metadata: Mapping[str, str], operation: str, file: str) -> Figures:
    """Return what the search measured, empty of a file that does not say it. operation, file: as for `own_outputs`."""
    return cast("Figures", _entry(metadata, FIGURES_KEY, Figures, operation, file))


def _entry(metadata: Mapping[str, str], key: str, kind: Any, operation: str, file: str) -> Any:
    place = Place(operation, f"{file}: {key}")
    return read_as(kind, read_json(metadata.get(key, "{}"), place), place)
