"""A timm model to an int8 ONNX file: `python examples/quantize_timm.py`.

Weights and images are random here, so that it runs offline: pass `pretrained=True` and your own preprocessed images.
"""

from __future__ import annotations

import timm
import torch

import ptq4vit_fx as ptq

model = timm.create_model("tiny_vit_5m_224", pretrained=False, num_classes=10)
images = torch.randn(4, 3, 224, 224)

converted = ptq.quantize(model, images)
print(converted.plan.table())
print(ptq.export_onnx(converted, "tiny_vit.onnx", images[:1]))
print(ptq.verify_onnx("tiny_vit.onnx", converted, images))
