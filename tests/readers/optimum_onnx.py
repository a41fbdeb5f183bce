"""Open a folder of export_huggingface with optimum-onnx and classify pictures; print the answers as JSON.

    python optimum_onnx.py FOLDER PICTURE...

Runs in an environment of its own (`make readers`): the transformers that optimum-onnx imports is an older one.
"""

from __future__ import annotations

import json
import sys

from PIL import Image


def main(folder: str, pictures: list[str]) -> None:
    """Print for each picture the class, its label and the logits."""
    from optimum.onnxruntime import ORTModelForImageClassification
    from transformers import AutoImageProcessor

    model = ORTModelForImageClassification.from_pretrained(
        folder, subfolder="onnx", file_name="model_quantized.onnx", use_io_binding=False
    )
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    answers = []
    for picture in pictures:
        logits = model(**processor(Image.open(picture), return_tensors="pt")).logits[0]
        best = int(logits.argmax())
        answers.append({"class": best, "label": model.config.id2label[best], "values": logits[:5].tolist()})
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
