"""`verify_onnx`: ONNX Runtime beside the PyTorch simulation on real images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure, printable
from ptq4vit_fx.export.model_files import load_file, unreadable
from ptq4vit_fx.export.proof.layers import LayerComparison, Layers, compare_layers
from ptq4vit_fx.export.proof.outputs import Array, outputs_of_file, outputs_of_model
from ptq4vit_fx.export.proof.runtime import open_session, products_saturate
from ptq4vit_fx.export.proof.runtime_functions import RuntimeFunctions
from ptq4vit_fx.export.proof.runtime_graph import RuntimeGraph, runtime_graph
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.passes.graph.contract import on_cpu
from ptq4vit_fx.passes.graph.outputs import logits_in
from ptq4vit_fx.passes.graph.running import run
from ptq4vit_fx.passes.graph.staged_model import model_at
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.torch_state import independent_of_caller


@dataclass(frozen=True)
class Disagreement:
    """An image on which the top-1 classes differ.

    simulated, actual: the class that each chose. margin: how far the simulation's class leads over the runtime's, in
    the simulation's logits. difference: the largest logit difference on that image.
    """

    image: int
    simulated: int
    actual: int
    margin: float
    difference: float


@dataclass(frozen=True)
class Comparison:
    """Logits of ONNX Runtime against logits of the simulation, over all images.

    max_absolute_difference: in logits. median_difference: of the largest one per image. max_relative_difference: the
    largest one over the largest logit of the same image. agreement: share of images with the same top-1.
    bit_equal: share of images whose logits are all equal, bit for bit.
    cosine: the smallest over the images.
    """

    images: int
    max_absolute_difference: float
    median_difference: float
    max_relative_difference: float
    agreement: float
    bit_equal: float
    cosine: float
    disagreements: tuple[Disagreement, ...]

    def __str__(self) -> str:
        return (
            f"top-1 agreement {self.agreement:.2%}, bit-equal {self.bit_equal:.2%}, largest logit difference "
            f"{self.max_absolute_difference:.3g} ({self.max_relative_difference:.2%} of the largest logit), smallest "
            f"cosine {self.cosine:.6f}"
        )


@np.errstate(invalid="ignore", over="ignore")  # infinity, or numbers close to it
def compare(simulated: Array, actual: Array) -> Comparison:
    """Compare two sets of logits, (images, classes) float32 each; or of other outputs (images, ...) of any type."""
    tiny = np.finfo(np.float32).tiny
    simulated, actual = _comparable(simulated, actual)
    difference, scale = np.abs(actual - simulated).max(1, initial=0), np.abs(simulated).max(1, initial=0)
    wide = [x.astype(np.float64) for x in (simulated, actual)]  # the square of a logit of 1e20 is no float32
    norms = np.linalg.norm(wide[0], axis=1) * np.linalg.norm(wide[1], axis=1)
    cosine = (wide[0] * wide[1]).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)
    top, mine = (x.argmax(1) if x.shape[1] else np.zeros(len(x), np.int64) for x in (actual, simulated))
    rows = np.arange(len(top))
    margin = simulated[rows, mine] - simulated[rows, top] if simulated.shape[1] else difference
    return Comparison(
        images=len(top),
        max_absolute_difference=float(difference.max()),
        median_difference=float(np.median(difference)),
        max_relative_difference=float((difference / np.maximum(scale, tiny)).max()),
        agreement=float((top == mine).mean()),
        bit_equal=float((difference == 0).mean()),
        cosine=float(np.where((norms == 0) & (difference == 0), 1.0, cosine).min()),
        disagreements=tuple(
            Disagreement(int(i), int(mine[i]), int(top[i]), float(margin[i]), float(difference[i]))
            for i in np.flatnonzero(top != mine)
        ),
    )


def _comparable(simulated: Array, actual: Array) -> tuple[Array, Array]:
    """Return both as floats (images, values), 0 where both have the same infinity or NaN: a mask is no difference."""
    floats = np.float32 if actual.dtype.kind in "fb" else np.float64
    mine, theirs = (x.reshape(len(x), -1).astype(floats) for x in (simulated, actual))
    same = ~np.isfinite(mine) & ((mine == theirs) | (np.isnan(mine) & np.isnan(theirs)))
    return np.where(same, floats(0), mine), np.where(same, floats(0), theirs)


def compare_outputs(simulated: Mapping[str, Array], actual: Mapping[str, Array]) -> Comparison:
    """Compare every output of a file with the simulation's: the worst of all, and the classes of the logits.

    Of integers (classes, masks) only the equality counts. Without logits among several outputs, the position of the
    largest value of all outputs is what agrees or not.
    """
    names = [name for name in actual if actual[name].dtype.kind == "f"] or list(actual)
    each = {name: compare(simulated[name], actual[name]) for name in names}
    found = logits_in({name: actual[name] for name in names})
    decisive = each.get(found or "") or compare(
        *(np.concatenate([side[n].reshape(len(side[n]), -1) for n in names], axis=1) for side in (simulated, actual))
    )
    equal = [(mine == theirs).all(1) for mine, theirs in (_comparable(simulated[n], actual[n]) for n in actual)]
    return replace(
        decisive,
        max_absolute_difference=max(found.max_absolute_difference for found in each.values()),
        median_difference=max(found.median_difference for found in each.values()),
        max_relative_difference=max(found.max_relative_difference for found in each.values()),
        bit_equal=float(np.all(equal, axis=0).mean()),
        cosine=min(found.cosine for found in each.values()),
    )


#: The share of images with the simulation's class, and the cosine, from which on a file may be what was simulated
#: though not every bit is: float convolutions of random networks went down to 0.9987 (tools/coverage.py).
SAME_CLASS, SAME_COSINE = 0.998, 0.995


@dataclass(frozen=True)
class VerifyReport:
    """How the file behaves in ONNX Runtime against the simulation in PyTorch.

    simulation: against the converted model as it runs in PyTorch. same_functions: against the converted model with
    LayerNorm, softmax and GELU computed by ONNX Runtime's kernels (`RuntimeFunctions`): what is left then is a real
    difference between the file and the simulation. saturating: this CPU's default u8 x s8 kernels are inexact (no
    VNNI); both comparisons are then of an exact session, and `default_agreement` tells what a plain session does.
    code_comparison: the integer codes of every site on the first images; None if not asked for. outputs: every output
    of the file by itself, under the model's own name, against the model as it runs in PyTorch.
    """

    simulation: Comparison
    same_functions: Comparison
    graph: RuntimeGraph
    saturating: bool
    default_agreement: float
    code_comparison: Layers | None
    outputs: Mapping[str, Comparison] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.simulation.images

    @property
    def ok(self) -> bool:
        """Whether the file computes what was simulated; how good that is, `compare_float` tells.

        With LayerNorm, softmax and GELU from the runtime on both sides: the same bits on every image. Or, as float
        operators differ in the last bit, the same class on SAME_CLASS of them, outputs whose cosine is SAME_COSINE at
        least, and, as far as layers were compared, every scale and every weight.
        """
        same = self.same_functions
        if same.bit_equal == 1.0:
            return True
        constants = all(layer.same_scale and (layer.images > 0 or layer.equal == 1.0) for layer in self.layers)
        return constants and same.agreement >= SAME_CLASS and same.cosine >= SAME_COSINE

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers behind the report, JSON-ready; the file's nodes and sites are those of `inspect`."""
        first = self.first_divergence
        return {
            "ok": self.ok,
            "images": self.images,
            "same_functions": asdict(self.same_functions),
            "simulation": asdict(self.simulation),
            "saturating": self.saturating,
            "default_agreement": self.default_agreement,
            "outputs": {name: asdict(found) for name, found in self.outputs.items()},
            "sites_compared": len(self.layers),
            "first_divergence": None if first is None else first.site,
            "integer_products": len(self.graph.integer_products),
            "float_products": dict(self.graph.float_products),
        }

    @property
    def layers(self) -> tuple[LayerComparison, ...]:
        """Every site in the order of execution; empty if layers were not compared."""
        return () if self.code_comparison is None else self.code_comparison.sites

    @property
    def first_divergence(self) -> LayerComparison | None:
        """The first site, in the order of execution, whose codes or scale differ; None if all are equal."""
        return None if self.code_comparison is None else self.code_comparison.first_divergence

    def __str__(self) -> str:
        lines = [
            f"ONNX Runtime against the simulation, {self.images} images",
            f"  LayerNorm, softmax and GELU from the runtime: {self.same_functions}",
            f"  LayerNorm, softmax and GELU from PyTorch:     {self.simulation}",
            f"  {self._explanation()}",
        ]
        if len(self.outputs) > 1:
            lines += [
                f"  output {name}: bit-equal {found.bit_equal:.2%}, largest difference "
                f"{found.max_absolute_difference:.3g}, smallest cosine {found.cosine:.6f}"
                for name, found in self.outputs.items()
            ]
        if self.code_comparison is not None:
            lines += [f"  {line}" for line in str(self.code_comparison).splitlines()]
        lines += [
            f"  other class on image {item.image}, {item.actual} instead of {item.simulated}: the simulation prefers "
            f"its own by {item.margin:.3g}; largest logit difference {item.difference:.3g}, median over all images "
            f"{self.simulation.median_difference:.3g}"
            for item in self.simulation.disagreements[:5]
        ]
        if self.saturating:
            lines.append(
                f"  this CPU has no VNNI: the default u8 x s8 kernels saturate, agreement "
                f"{self.default_agreement:.2%}; "
                'for such CPUs export with target="onnxruntime-avx2", or quantize with w_bits=7'
            )
        lines.append("operators, in the file and after ONNX Runtime's own optimization:")
        for name in sorted({*self.graph.before, *self.graph.after}):
            lines.append(f"  {name:24}{self.graph.before.get(name, 0):6}{self.graph.after.get(name, 0):6}")
        lines.append(
            f"{len(self.graph.integer_products)} products run as integers, {len(self.graph.float_products)} in float"
        )
        lines += [f"  float: {name}: {reason}" for name, reason in self.graph.float_products.items()]
        return "\n".join(map(printable, lines))

    def _explanation(self) -> str:
        if self.simulation.bit_equal == 1.0:
            return "the file computes what was simulated, to the last bit"
        if self.same_functions.bit_equal > self.simulation.bit_equal:
            return (
                f"with these functions alike, {self.same_functions.bit_equal:.1%} of the images agree to the last bit: "
                "the two libraries round the functions differently, and quantizers amplify the last bit"
            )
        return "more than these functions differs: other float operators, or products that stay float (see below)"


def _check_sizes(path: str, simulated: Mapping[str, Array], actual: Mapping[str, Array]) -> None:
    """Raise PTQError if an output of a file has other numbers of images or values than that of the model."""
    for name, theirs in actual.items():
        mine = simulated[name]
        if (len(mine), mine.size) != (len(theirs), theirs.size):
            got, do = f"{theirs.shape}", "pass the file that was exported from this model"
            subject = f"{path}: output {name}"
            raise failure("verify_onnx", subject, expected=f"the model's shape {mine.shape}", got=got, do=do)


@independent_of_caller()
def verify_onnx(
    path: str | os.PathLike[str], converted: GraphModule, data: Any, *, layers: int = 8, images: int | None = None
) -> VerifyReport:
    """Run the file in ONNX Runtime and the converted model in PyTorch on the same images; return the comparison.

    data, images: as for `calibrate`. layers: number of images, the first ones, on which the integer codes of every
    site are compared too, 0 for none. Raises PTQError if the file cannot be read or the images do not fit.
    """
    converted = model_at(Stage.CONVERTED, converted, "verify_onnx", "call convert_fx(prepared) first")
    batches = batches_for(converted, data, "verify_onnx", images=images)
    saturating = products_saturate()
    session = open_session(path)
    device = next((buffer.device for buffer in converted.buffers()), torch.device("cpu"))
    simulated = outputs_of_model(lambda *inputs: run(converted, inputs, "verify_onnx"), batches, device)
    here = on_cpu(converted)
    alike = outputs_of_model(RuntimeFunctions(here).run, batches, torch.device("cpu"))
    actual = outputs_of_file(str(path), session, batches, list(simulated))
    plain = open_session(path, exact=False) if saturating else None
    default = actual if plain is None else outputs_of_file(str(path), plain, batches, list(simulated))
    _check_sizes(str(path), simulated, actual)
    with unreadable("verify_onnx", path, "a graph of products"):
        graph = runtime_graph(load_file(path))
    return VerifyReport(
        simulation=compare_outputs(simulated, actual),
        same_functions=compare_outputs(alike, actual),
        graph=graph,
        saturating=saturating,
        default_agreement=compare_outputs(simulated, default).agreement,
        code_comparison=compare_layers(here, path, session, batches, layers) if layers > 0 else None,
        outputs={name: compare(simulated[name], array) for name, array in actual.items()},
    )
