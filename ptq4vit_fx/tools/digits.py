"""The embedded default model: a small ViT that reads handwritten digits of 8x8 pixels, drawn at 16x16, 64 tokens.

Images, model and checkpoint come with the installation, so everything in this package can be tried offline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ptq4vit_fx.errors import check_extra, failure

#: Arguments of timm's VisionTransformer: 64 patches and a class token, 105,290 parameters.
ARCHITECTURE: dict[str, object] = {
    "img_size": 16,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 4.0,
}

#: Where the shipped weights lie; `examples/train_digits_vit.py` wrote them.
CHECKPOINT = Path(__file__).parent / "assets" / "digits_vit.safetensors"

TEST_IMAGES = 500
SPLIT_SEED = 0


def build_model() -> nn.Module:
    """Return the model in training mode with random weights, drawn from torch's global generator.

    It maps images (batch, 1, 16, 16), float32, to logits (batch, 10), float32.
    """
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(**ARCHITECTURE)
    return model


def load_digits_model(weights: Path | None = None) -> nn.Module:
    """Return the trained model in evaluation mode, on the CPU.

    weights: a safetensors file of float32 tensors that fit `build_model()` exactly; None takes the shipped one.
    Raises PTQError (a ValueError) if the file is missing, unreadable or belongs to another model.
    """
    path = CHECKPOINT if weights is None else weights
    model = build_model()
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise failure(
            "load_digits_model",
            str(path),
            expected="a safetensors checkpoint of the digits model",
            got=" ".join(str(error).split()),
            do="pass a file that examples/train_digits_vit.py wrote, or None for the shipped one",
        ) from error
    return model.eval()


def load_digits_images(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Return the images and labels of one part of scikit-learn's 1,797 handwritten digits.

    split: "train" (1,297 images) or "test" (500); always the same images, each digit with the same share in both.
    Images: (count, 1, 16, 16), float32, from -1 (background) to 1 (ink), enlarged with bicubic interpolation.
    Labels: (count,), int64, 0 to 9.
    Raises PTQError (a ValueError) for any other split, and without scikit-learn, which the extra `demo` brings.
    """
    if split not in ("train", "test"):
        raise failure(
            "load_digits_images",
            "split",
            expected="'train' or 'test'",
            got=repr(split),
            do="pass one of the two",
        )
    check_extra("load_digits_images", "scikit-learn's digits", "demo", "sklearn")
    # Both take seconds to import, and only this function needs them.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_IMAGES, random_state=SPLIT_SEED, stratify=labels
    )
    chosen = (train_images, train_labels) if split == "train" else (test_images, test_labels)
    ink = torch.as_tensor(chosen[0], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    large = F.interpolate(ink, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    return (large - 0.5) / 0.5, torch.as_tensor(chosen[1], dtype=torch.int64)
