"""A torchvision model to an int8 ONNX file, its head left float: `python examples/quantize_torchvision.py`.

Weights and images are random here, so that it runs offline: pass `weights="DEFAULT"` and your own images. The attention
of `vit_b_16` is nn.MultiheadAttention, which is opened into its four products.
"""

from __future__ import annotations

import torch
from torchvision.models import VisionTransformer

import ptq4vit_fx as ptq

model = VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128)
images = torch.randn(4, 3, 64, 64)

prepared = ptq.prepare_fx(model, ptq.recipes.ptq4vit(8, 8), images[:1], skip=["heads"])
ptq.calibrate(prepared, images)
converted = ptq.convert_fx(prepared)
print(ptq.export_onnx(converted, "torchvision_vit.onnx", images[:1]))
print(ptq.verify_onnx("torchvision_vit.onnx", converted, images))
