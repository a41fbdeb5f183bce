"""The small model that every target's good input comes from."""

from __future__ import annotations

import functools
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.fx import GraphModule

import ptq4vit_fx as ptq

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@functools.cache
def prepared() -> GraphModule:
    """Return a ViT of one block, prepared and calibrated: every kind of quantizer and granularity."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5).eval()
    graph_module = ptq.prepare_fx(model, ptq.recipes.ptq4vit().with_search(n=8, rounds=1), IMAGES[:1])
    ptq.calibrate(graph_module, IMAGES, progress=False)
    return graph_module


def calibrated() -> ptq.Calibration:
    """Return the calibration of that model."""
    return cast("ptq.Calibration", prepared().calibration)
