"""The table of `ptq4vit coverage`: a row per family, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

COLUMNS = (
    *("family", "model", "traced by", "layers", "attention products", "twins", "multiplications"),
    *("int8 / float", "file / int8", "seconds", "notes"),
)

LEGEND = """# Families

One model of each family with random weights, small where its constructor allows, taken through tracing, calibration on
4 random images, conversion (W8A8, recipe `ptq4vit`), export and ONNX Runtime. Written by `make coverage`
(`ptq4vit coverage --out docs`); `coverage.json` holds the same.

- traced by: torch.fx's tracer or torch.export; either way bit-equal to the model at batch 1 and 4
- layers: `nn.Linear` and `nn.Conv2d` quantized (+ those that ran on constants and were computed once) of those that ran
- attention products: products of two activations, quantized of those that ran
- twins: twin quantizers, of the softmaxes and GELU-like functions in the graph; some feed no product directly, some
  feed several
- multiplications: share of all multiplications of the float model that is quantized; what is not is in the notes
- int8 / float and file / int8: smallest cosine of the logits, over the 4 images, between the quantized and the float
  model, and between ONNX Runtime and the quantized model. The first one says little with random weights

The models are shallow on purpose: with random weights, one code that two libraries round differently changes the logits
of a deep convolutional network. RepViT-M0.9, EfficientViT-B0 and -M0 and MobileViTv2-0.5 of full depth have half of the
images or more equal to the last bit and cosines down to 0.98 on the others, and so has the simulation against itself
when the images are moved by 1e-5.
"""


@dataclass(frozen=True)
class Row:
    """What happened to one family.

    tracer: the one that got through. layers: nn.Linear and nn.Conv2d that ran, and how many are quantized, folded into
    constants, or float. attention: products of two activations that ran, and how many are quantized. twins: twin
    quantizers; twin_functions: softmaxes and GELU-like functions that ran. multiplies: share of all multiplications
    that is quantized. float_ops: what stays float, with the reason. int8: cosine of the simulation with the float
    model. cosine: of ONNX Runtime with the simulation. problem: why the family does not work, or None.
    """

    family: str
    model: str
    tracer: str = ""
    layers: int = 0
    quantized_layers: int = 0
    folded_layers: int = 0
    attention: int = 0
    quantized_attention: int = 0
    twins: int = 0
    twin_functions: int = 0
    multiplies: float = 0.0
    float_ops: dict[str, str] = field(default_factory=dict)
    int8: float = 0.0
    cosine: float = 0.0
    seconds: float = 0.0
    problem: str | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the Markdown table, in the order of COLUMNS."""
        folded = f" + {self.folded_layers}" if self.folded_layers else ""
        notes = [self.problem] if self.problem else []
        notes += [f"float: {name} ({reason})" for name, reason in self.float_ops.items()]
        return (
            self.family,
            f"`{self.model}`",
            {"trace": "fx", "trace_by_export": "export"}.get(self.tracer, ""),
            f"{self.quantized_layers}{folded} of {self.layers}",
            f"{self.quantized_attention} of {self.attention}",
            f"{self.twins} of {self.twin_functions}",
            f"{self.multiplies:.1%}",
            f"{self.int8:.4f}",
            f"{self.cosine:.6f}",
            f"{self.seconds:.0f}",
            "; ".join(notes).replace("|", "\\|"),
        )


def markdown(rows: Sequence[Row]) -> str:
    """Return the legend, how many families work, and the table."""
    working = sum(row.problem is None for row in rows)
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(" | ".join(row.cells) for row in rows)]
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{LEGEND}\n{working} of {len(rows)} families work.\n\n{table}"
