"""Random small models and what is done with them: a seed is a model, its images, a recipe, a target, an opset, a batch.

Run `python random_models.py 0 300` in this folder for a line per seed, with what ONNX Runtime and PyTorch disagree in.
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import GELUTanh, QuickGELU, RmsNorm
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.qconfig import QConfigMapping

ACTIVATIONS: tuple[type[nn.Module], ...] = (*(nn.GELU,) * 3, nn.ReLU, nn.SiLU, QuickGELU, GELUTanh, nn.Hardswish)
TARGETS = (*("onnxruntime",) * 4, "onnxruntime-avx2", "onnxruntime-arm", "openvino", "tensorrt", "generic", "generic")
RECIPES = (*(f"{w} {t}" for w in ("channel", "group") for t in ("exact", "wide", "uniform")), "base_ptq")
#: Noise on the images that shows how much a model amplifies, relative to them.
CHANGE = 1e-3
NORMS: tuple[Any, ...] = (
    partial(nn.LayerNorm, eps=1e-6),
    partial(nn.LayerNorm, eps=1e-6),
    partial(nn.LayerNorm, eps=1e-5, elementwise_affine=False),
    partial(RmsNorm, eps=1e-6),
)


@dataclass(frozen=True)
class Case:
    """What one seed stands for. bits: of weights and activations; one module's are `own_bits`."""

    seed: int
    model: nn.Module
    images: torch.Tensor
    bits: tuple[int, int]
    recipe: str
    own_bits: tuple[int, int] | None
    target: str
    opset: int
    batch: int | None
    what: str

    @property
    def has_8_bits(self) -> bool:
        """Whether every operand has 8 bits: then the converted model is near the float one."""
        return self.bits == (8, 8) and self.own_bits in (None, (8, 8))

    @property
    def mapping(self) -> QConfigMapping:
        """The recipe with a small search, and one module with bits of its own."""
        mapping = recipe_of(self.recipe, *self.bits)
        if self.own_bits is not None:
            mapping = mapping.set_module_name_regex(r".*fc1", recipe_of(self.recipe, *self.own_bits).global_qconfig)
        return mapping.with_search(n=12, rounds=1)


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    error: of the converted model against the float one, in the norm of the float outputs. amplification: how many times
    larger than a change of the images, both relative, is that of the float outputs. warned: whether the calibration
    says of an operand or a product that it is weak. bit_equal: share of images
    that are the same in ONNX Runtime, bit for bit, with its functions on both sides; difference: the largest, over the
    largest output.
    """

    finite: bool
    usable_scales: bool
    warned: bool
    error: float
    amplification: float
    bit_equal: float
    difference: float


def recipe_of(name: str, w_bits: int, a_bits: int) -> QConfigMapping:
    if name == "base_ptq":
        return ptq.recipes.base_ptq(w_bits, a_bits)
    if name == "tensorrt":
        return ptq.recipes.tensorrt(w_bits, 8)
    weights, twins = name.split()
    return ptq.recipes.ptq4vit(w_bits, a_bits, weights=weights, twins=twins)  # type: ignore[arg-type]


def random_case(seed: int) -> Case:
    """Return the case of a seed, the same on every machine."""
    draw = random.Random(seed)
    target, recipe = draw.choice(TARGETS), draw.choice(RECIPES)
    activations = [act for act in ACTIVATIONS if target != "tensorrt" or act is not nn.ReLU]  # which takes 7 bits there
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, what = _model(draw, draw.choice(activations))
        _fill(model, draw)
        size, channels = model.image
        images = torch.randn(draw.choice([1, 1, 3, 8]), channels, *size)
    bits = draw.choice([(8, 8), (8, 8), (draw.randint(2, 8), draw.randint(2, 8))])
    if target == "tensorrt":
        recipe, bits = "tensorrt", (bits[0], 8)
    if target == "openvino":
        recipe = recipe.replace("wide", "exact")
    own = (draw.randint(2, 8), draw.randint(2, 8)) if draw.random() < 0.2 and target != "tensorrt" else None
    opset, batch = draw.randint(17, 23), draw.choice([None, None, None, 1, 3])
    what = f"{what} {tuple(images.shape)} {recipe} W{bits[0]}A{bits[1]} {own or ''} {target} {opset} batch {batch}"
    return Case(seed, model, images, bits, recipe, own, target, opset, batch, what)


def _model(draw: random.Random, act: type[nn.Module]) -> tuple[Any, str]:
    """Return a model with random structure, and a few words about it."""
    patch = draw.choice([2, 3, 4, 5])
    size = tuple(patch * draw.randint(2, 5) for _ in range(2))
    channels, heads = draw.choice([1, 3, 3, 4]), draw.choice([1, 2, 3, 4])
    norm = draw.choice(NORMS)
    settings: dict[str, Any] = {"patch_size": patch, "in_chans": channels, "num_classes": draw.choice([2, 5, 10])}
    if draw.random() < 0.1:
        side, settings["num_blocks"] = size[0], draw.choice([1, 2])
        model: Any = MlpMixer(img_size=side, embed_dim=8 * heads, act_layer=act, norm_layer=NORMS[0], **settings)
        model.image = ((side, side), channels)
        return model.eval(), f"mixer {act.__name__}"
    pool = draw.choice(["token", "token", "avg", "max", "map"])
    settings |= {
        "embed_dim": heads * draw.choice([3, 4, 7, 8, 16]),
        "depth": draw.choice([1, 1, 1, 2]),
        "num_heads": heads,
        "mlp_ratio": draw.choice([0.5, 1.0, 2.5, 4.0]),
        "qkv_bias": draw.random() < 0.7,
        "qk_norm": draw.random() < 0.25,
        "init_values": draw.choice([None, None, 0.1]),
        "class_token": pool == "token" or draw.random() < 0.3,
        "reg_tokens": draw.choice([0, 0, 2]),
        "global_pool": pool,
        "pre_norm": draw.random() < 0.15,
        "final_norm": draw.random() < 0.9,
    }
    model = VisionTransformer(img_size=size, act_layer=act, norm_layer=norm, **settings)
    model.image = (size, channels)
    return model.eval(), f"vit {settings['embed_dim']}/{heads} {act.__name__} {norm.func.__name__} {pool}"


def _fill(model: nn.Module, draw: random.Random) -> None:
    """Give parameters random values of the size of trained ones, with channels that are dead or large."""
    dead, no_bias = draw.random() < 0.3, draw.random() < 0.2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.normal_(0, 1.5 / fan**0.5 if "weight" in name else 0.5)
                if dead and "weight" in name and draw.random() < 0.5:
                    parameter[draw.randrange(len(parameter))] = 0.0
                    parameter[draw.randrange(len(parameter))] *= 20.0
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.3, 1.7)
                if dead:
                    parameter[draw.randrange(len(parameter))] = 0.0
            elif name.endswith("bias"):
                parameter.normal_(0, 0.0 if no_bias else 0.3)


def outcome(case: Case, folder: Path) -> Outcome:
    """Quantize, export, run; raises PTQError where a stage refuses."""
    converted = ptq.quantize(case.model, case.images, qconfig_mapping=case.mapping, progress=False)
    with torch.inference_mode():
        expected, actual = case.model(case.images), converted(case.images)
        moved = [case.model(images) for images in _moved(case.images, case.seed)]
    smallest = torch.finfo(torch.float32).tiny

    def distance(outputs: torch.Tensor) -> float:
        return float((outputs - expected).norm() / expected.norm().clamp_min(smallest))

    scales = [x for params in converted.calibration.params.values() for x in params.tensors().values()]
    path = folder / f"{case.seed}.onnx"
    ptq.export_onnx(converted, path, case.images[:1], target=case.target, opset=case.opset, batch=case.batch)
    shown = case.images
    if case.batch is not None:  # a whole number of batches
        count = -(-len(shown) // case.batch) * case.batch
        shown = shown[torch.arange(count) % len(shown)]
    report = ptq.verify_onnx(path, converted, list(torch.split(shown, case.batch or len(shown))), layers=0)
    path.unlink()
    same = report.same_functions
    return Outcome(
        finite=bool(torch.isfinite(actual).all()),
        usable_scales=all(bool(torch.isfinite(x).all() and (x >= smallest).all()) for x in scales),
        warned=bool(converted.calibration.remarks()),
        error=distance(actual),
        amplification=max(map(distance, moved)) / CHANGE,
        bit_equal=same.bit_equal,
        difference=same.max_relative_difference,
    )


def _moved(images: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Return the images with a little noise, three times."""
    generator = torch.Generator().manual_seed(seed)
    return [images * (1 + CHANGE * torch.randn(images.shape, generator=generator)) for _ in range(3)]


def main(first: int, last: int) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, last):
            case = random_case(seed)
            try:
                found: Any = outcome(case, Path(folder))
            except Exception as error:  # noqa: BLE001 - a line for each
                found = f"{type(error).__name__}: {error}"
            print(seed, case.what, found, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
