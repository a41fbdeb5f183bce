"""A Hugging Face model to an int8 ONNX file: `python examples/quantize_huggingface.py` (extra: hf).

Weights and images are random here, so that it runs offline: use `ViTForImageClassification.from_pretrained(name)` and
the pixel_values of its image processor. The output's `logits` are what the file returns.
"""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

import ptq4vit_fx as ptq

config = ViTConfig(image_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
model = ViTForImageClassification(config)
pixel_values = torch.randn(4, 3, 64, 64)

converted = ptq.quantize(model, pixel_values)
print(ptq.export_onnx(converted, "hf_vit.onnx", pixel_values[:1]))
print(ptq.verify_onnx("hf_vit.onnx", converted, pixel_values))
