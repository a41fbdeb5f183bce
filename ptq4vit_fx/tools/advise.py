"""What int8 would save of a model on this machine, before any image is read: its products, timed one by one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ptq4vit_fx.api import calibrate, prepare_fx
from ptq4vit_fx.errors import PTQWarning
from ptq4vit_fx.export.proof.product_timing import ProductShapes
from ptq4vit_fx.recipes import ptq4vit
from ptq4vit_fx.tools.named.kinds import load_model
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tuning.mixing import product_shapes
from ptq4vit_fx.tuning.study import target_of
from ptq4vit_fx.tuning.timings import Timings, at_batch, measure_timings

#: Less than this part of float's time is no gain that one would see.
PAYS = 0.95


def time_model(
    name: str, arguments: Sequence[str], target: str, batch: int
) -> tuple[dict[str, ProductShapes], Timings]:
    """Return the products of a model by its name, without its weights, for `batch` images, and the seconds of each.

    Raises PTQError on an unknown model, and on a target that ONNX Runtime does not run.
    """
    target_of(target, "timings")
    named = load_model(Asked(name, arguments=tuple(arguments), pretrained=False))
    size = named.preprocessing["input_size"]
    return time_network(named.network, size, target, batch, name)


def time_network(
    network: nn.Module, size: Sequence[int], target: str, batch: int, name: str
) -> tuple[dict[str, ProductShapes], Timings]:
    """Return the products of a model for `batch` images, and the seconds of each in the runtime of a target."""
    shapes = at_batch(shapes_of(network, size), 1, batch)
    timed = (own for own in shapes.values() if own.kind != "conv2d")
    return shapes, measure_timings(timed, target, batch, model=name)


def shapes_of(network: nn.Module, size: Sequence[int]) -> dict[str, ProductShapes]:
    """Return the shapes of a model's products for one image, as the converted model will have them.

    It is converted with the scales of one random image: they play no part in shapes.
    """
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    quick = ptq4vit().with_search(metric="mse", n=1, rounds=1, max_shift=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PTQWarning)
        prepared = prepare_fx(network, quick, image)
        calibrate(prepared, image, progress=False)
        return product_shapes(prepared)


def advice_of(shapes: Mapping[str, ProductShapes], timings: Timings) -> tuple[str, ...]:
    """Return what the products take in float and as integers, and whether int8 pays here."""
    timed = [own for own in shapes.values() if own.kind != "conv2d"]
    left = len(shapes) - len(timed)
    plain, one, two = (1e3 * sum(timings.seconds(own, branches) for own in timed) for branches in (0, 1, 2))
    twins = 1e3 * sum(timings.seconds(own, 2 if not own.rhs_is_weight else 1) for own in timed)
    values = sum(math.prod(own.rhs) for own in timed if own.rhs_is_weight)
    pays = sum(timings.seconds(own, 1) < PAYS * timings.seconds(own, 0) for own in timed)
    gain = f"int8 pays: {plain / one:.2f} times as fast in its products"
    verdict = gain if one < PAYS * plain else "int8 does not pay"
    return (
        f"{timings.machine}, {timings.runtime}, {timings.images} images at a time, ms per image in products:",
        f"float {plain:.3g}, int8 {one:.3g}, int8 with twins in attention {twins:.3g}, everywhere {two:.3g}",
        f"weights: float {4e-6 * values:.1f} MB, int8 {1e-6 * values:.1f} MB, 4 bits {0.5e-6 * values:.1f} MB "
        "(--w-bits 4 --a-bits 32 --target generic --opset 21: about float's time)",
        f"{verdict} on this machine; {pays} of {len(timed)} products gain"
        + (f"; {left} convolutions stay float in ONNX Runtime" if left else ""),
    )
