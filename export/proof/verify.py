"""`verify_onnx`: ONNX Runtime beside the PyTorch simulation on real images."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ptq4vit_fx.batches import Inputs, batches_for
from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.model_files import load_file
from ptq4vit_fx.export.proof.layers import LayerComparison, Layers, compare_layers
from ptq4vit_fx.export.proof.runtime import open_session, products_saturate
from ptq4vit_fx.export.proof.runtime_functions import RuntimeFunctions
from ptq4vit_fx.export.proof.runtime_graph import RuntimeGraph, runtime_graph
from ptq4vit_fx.torch_state import independent_of_caller

Logits = np.ndarray[Any, np.dtype[np.float32]]


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


def compare(simulated: Logits, actual: Logits) -> Comparison:
    """Compare two sets of logits, (images, classes) float32 each."""
    tiny = np.finfo(np.float32).tiny
    difference, scale = np.abs(actual - simulated).max(1), np.abs(simulated).max(1)
    norms = np.linalg.norm(actual, axis=1) * np.linalg.norm(simulated, axis=1)
    top, mine = actual.argmax(1), simulated.argmax(1)
    rows = np.arange(len(top))
    margin = simulated[rows, mine] - simulated[rows, top]
    return Comparison(
        images=len(top),
        max_absolute_difference=float(difference.max()),
        median_difference=float(np.median(difference)),
        max_relative_difference=float((difference / np.maximum(scale, tiny)).max()),
        agreement=float((top == mine).mean()),
        bit_equal=float((difference == 0).mean()),
        cosine=float(((actual * simulated).sum(1) / np.maximum(norms, tiny)).min()),
        disagreements=tuple(
            Disagreement(int(i), int(mine[i]), int(top[i]), float(margin[i]), float(difference[i]))
            for i in np.flatnonzero(top != mine)
        ),
    )


@dataclass(frozen=True)
class VerifyReport:
    """How the file behaves in ONNX Runtime against the simulation in PyTorch.

    simulation: against the converted model as it runs in PyTorch. same_functions: against the converted model with
    LayerNorm, softmax and GELU computed by ONNX Runtime's kernels (`RuntimeFunctions`): what is left then is a real
    difference between the file and the simulation. saturating: this CPU's default u8 x s8 kernels are inexact (no
    VNNI); both comparisons are then of an exact session, and `default_agreement` tells what a plain session does.
    code_comparison: the integer codes of every site on the first images; None if not asked for.
    """

    simulation: Comparison
    same_functions: Comparison
    graph: RuntimeGraph
    saturating: bool
    default_agreement: float
    code_comparison: Layers | None

    @property
    def images(self) -> int:
        return self.simulation.images

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
        return "\n".join(lines)

    def _explanation(self) -> str:
        if self.simulation.bit_equal == 1.0:
            return "the file computes what was simulated, to the last bit"
        if self.same_functions.bit_equal > self.simulation.bit_equal:
            return (
                f"with these functions alike, {self.same_functions.bit_equal:.1%} of the images agree to the last bit: "
                "the two libraries round the functions differently, and quantizers amplify the last bit"
            )
        return "more than these functions differs: other float operators, or products that stay float (see below)"


@independent_of_caller()
def verify_onnx(
    path: str | os.PathLike[str], converted: GraphModule, data: Tensor | Iterable[Any], *, layers: int = 8
) -> VerifyReport:
    """Run the file in ONNX Runtime and the converted model in PyTorch on the same images; return the comparison.

    data: as for `calibrate`: image batches, labels ignored. layers: number of images, the first ones, on which the
    integer codes of every site are compared too, 0 for none. Raises PTQError if the file cannot be read or the images
    do not fit.
    """
    batches = batches_for(converted, data, "verify_onnx")
    saturating = products_saturate()
    session = open_session(path)
    actual = _run(path, session, batches)
    default = _run(path, open_session(path, exact=False), batches) if saturating else actual
    simulated = _simulate(converted, batches)
    return VerifyReport(
        simulation=compare(simulated, actual),
        same_functions=compare(_simulate_with_runtime_functions(converted, batches), actual),
        graph=runtime_graph(load_file(path)),
        saturating=saturating,
        default_agreement=float((default.argmax(1) == simulated.argmax(1)).mean()),
        code_comparison=compare_layers(converted, path, session, batches, layers) if layers > 0 else None,
    )


def _simulate(converted: GraphModule, batches: list[Inputs]) -> Logits:
    device = next((buffer.device for buffer in converted.buffers()), torch.device("cpu"))
    with torch.inference_mode():
        return np.concatenate([_rows(converted(*(x.to(device) for x in batch))) for batch in batches])


def _simulate_with_runtime_functions(converted: GraphModule, batches: list[Inputs]) -> Logits:
    simulation = RuntimeFunctions(copy.deepcopy(converted).cpu())
    with torch.inference_mode():
        return np.concatenate([_rows(simulation.run(*(x.cpu() for x in batch))) for batch in batches])


def _rows(output: Any) -> Logits:
    """Return all tensors of an output, or arrays of the runtime, side by side: (images, values) float32."""
    arrays = [x.float().cpu().numpy() if isinstance(x, Tensor) else x for x in tree_leaves(output)]
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)


def _run(path: str | os.PathLike[str], session: InferenceSession, batches: list[Inputs]) -> Logits:
    names = [entry.name for entry in session.get_inputs()]

    def feed(batch: Inputs) -> dict[str, Any]:
        return {name: x.cpu().numpy() for name, x in zip(names, batch, strict=True)}

    try:
        return np.concatenate([_rows(session.run(None, feed(batch))) for batch in batches])
    except Exception as error:
        raise failure(
            "verify_onnx",
            str(path),
            expected=f"images of shape {session.get_inputs()[0].shape}",
            got=f"{tuple(batches[0][0].shape)} ({error})".splitlines()[0],
            do="pass images of the size that was exported",
        ) from error
