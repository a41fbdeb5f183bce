"""What ONNX Runtime's own `quantize_static` makes of a float file: the baseline of `ptq4vit bench --static`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from ptq4vit_fx.errors import foreign
from ptq4vit_fx.export.proof.latency import OPERATION

#: Name -> arguments of `quantize_static`: its defaults, and what its documentation advises for x86.
BASELINES: dict[str, dict[str, Any]] = {
    "quantize_static": {},
    "quantize_static u8s8 per channel": {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
    },
}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands inputs to `quantize_static`, one feed at a time."""

    def __init__(self, feeds: Iterable[dict[str, Any]]) -> None:
        self._feeds: Iterator[dict[str, Any]] = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def write_static(
    float_file: str | os.PathLike[str],
    folder: Path,
    name: str,
    images: Iterable[NDArray[Any]],
    ways: Mapping[str, Mapping[str, Any]] = BASELINES,
) -> dict[str, Path]:
    """Let ONNX Runtime quantize a float file of one input in each of these ways; return name -> file in `folder`.

    name: of that input. images: each is one feed. Raises PTQError on what it cannot quantize.
    """
    images = list(images)
    prepared, written = folder / "prepared.onnx", {key: folder / f"{key}.onnx" for key in ways}
    do = "pass a float file, as `ptq4vit quantize --float-onnx` writes it"
    with foreign(OPERATION, str(float_file), expected="a file that quantize_static takes", do=do):
        quant_pre_process(float_file, prepared, skip_symbolic_shape=True)
        for key, options in ways.items():
            quantize_static(prepared, written[key], _Reader({name: np.asarray(image)} for image in images), **options)
    prepared.unlink()
    return written
