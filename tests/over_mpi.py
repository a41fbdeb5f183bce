"""Calibrate here and on the workers of MPI; print whether the bits are the same.

mpiexec -n 3 python -m mpi4py.futures over_mpi.py
"""

from __future__ import annotations

import torch
from mpi4py.futures import MPIPoolExecutor
from timm.models.vision_transformer import VisionTransformer

import ptq4vit_fx as ptq

if __name__ == "__main__":
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    images = torch.randn(16, 3, 16, 16)
    prepared = ptq.prepare_fx(model, ptq.recipes.best().with_search(n=4, rounds=1), images[:1])
    here = ptq.calibrate(prepared, images, progress=False)
    with MPIPoolExecutor() as pool:
        there = ptq.calibrate(prepared, images, executor=pool, groups=6, progress=False)
    print("same bits" if here.fingerprint() == there.fingerprint() else "other bits")
