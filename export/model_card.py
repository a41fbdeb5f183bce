"""README.md of a folder for Hugging Face's readers: what the file is, the figures there are, how to run it."""

from __future__ import annotations

from collections.abc import Mapping

from ptq4vit_fx.errors import printable
from ptq4vit_fx.export.onnx_export import ExportReport

CARD = """---
library_name: transformers.js
pipeline_tag: {task}
tags:
- onnx
- int8
- quantized
- ptq4vit_fx
---

# {name}

A vision transformer in int8: quantized after training by `ptq4vit_fx` (the method is PTQ4ViT, ECCV 2022), written as
ONNX with standard operators. `config.json` names a type because readers look for a class by it; what is computed is
what `onnx/model_quantized.onnx` holds, whatever family it comes from.

| | |
|---|---|
{rows}

## Use

With ONNX Runtime through optimum-onnx:

```python
from optimum.onnxruntime import {optimum}
from transformers import AutoImageProcessor

model = {optimum}.from_pretrained(".", subfolder="onnx", file_name="model_quantized.onnx")
processor = AutoImageProcessor.from_pretrained(".")
output = model(**processor(image, return_tensors="pt")).{output}
```

With transformers.js, in a browser or in node:

```javascript
import {{ pipeline }} from "@huggingface/transformers";

const run = await pipeline("{task}", "ORGANIZATION/{name}", {{ dtype: "q8" }});
console.log(await run("photo.png"));
```
"""


def model_card(name: str, report: ExportReport, figures: Mapping[str, str]) -> str:
    """Return the card of a file that gives `logits` or `last_hidden_state`. figures: further rows, name -> text."""
    rows = {
        "file": f"{report.bytes / 1e6:.2f} MB, the float weights {report.float_bytes / 1e6:.2f} MB",
        "quantized operands": str(report.sites),
        "ONNX operator set": str(report.opset),
        "written for": f"the target `{report.target}`",
        **figures,
    }
    (output,) = report.outputs
    classes = output == "logits"
    return CARD.format(
        name=printable(name),
        rows="\n".join(f"| {_cell(key)} | {_cell(text)} |" for key, text in rows.items()),
        task="image-classification" if classes else "image-feature-extraction",
        optimum="ORTModelForImageClassification" if classes else "ORTModelForFeatureExtraction",
        output=output,
    )


def _cell(text: str) -> str:
    """Return a text as a cell of a table: one line, without what would end the cell."""
    return printable(" ".join(str(text).split())).replace("|", "\\|")
