"""A small ViT for tests in seconds, the digits model, and the trained fixtures beside the checkout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.fx import GraphModule

import ptq4vit_fx as ptq

if WORKERS := int(
    os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")
):  # threads of one worker must not wait for another's
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of the programs that tests start

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


@pytest.fixture(scope="session")
def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()


@pytest.fixture(scope="session")
def small_images() -> torch.Tensor:
    return torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def small_converted(small_vit: nn.Module, small_images: torch.Tensor) -> GraphModule:
    """The small ViT at W8A8 by the default recipe. All tests of a process share it: change a deepcopy."""
    return ptq.quantize(small_vit, small_images, progress=False)


@pytest.fixture(scope="session")
def trained() -> ModuleType:
    if not FIXTURES.is_dir():
        pytest.skip(f"no trained models at {FIXTURES}")
    sys.path.insert(0, str(FIXTURES))
    import fixtures

    return fixtures
