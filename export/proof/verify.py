"""`verify_onnx`: ONNX Runtime beside the PyTorch simulation on real images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure, printable
from ptq4vit_fx.export.model_files import load_file, unreadable
from ptq4vit_fx.export.pixels import pixels_of
from ptq4vit_fx.export.proof.comparison import Comparison, compare, compare_outputs
from ptq4vit_fx.export.proof.layers import compare_layers
from ptq4vit_fx.export.proof.outputs import Array, outputs_of_file, outputs_of_model
from ptq4vit_fx.export.proof.runtime import open_session, products_saturate
from ptq4vit_fx.export.proof.runtime_functions import RuntimeFunctions
from ptq4vit_fx.export.proof.runtime_graph import RuntimeGraph, check_runs, runtime_graph, traps_met
from ptq4vit_fx.export.proof.site_codes import LayerComparison, Layers
from ptq4vit_fx.export.traps import Trap
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.inputs.progress import Show, UnderWay, counted, show_nothing
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.contract import on_cpu
from ptq4vit_fx.passes.graph.running import run
from ptq4vit_fx.passes.graph.staged_model import model_at
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.torch_state import independent_of_caller
from ptq4vit_fx.views.tabular import Tabular

#: The share of images with the simulation's class, and the cosine, from which on a file may be what was simulated
#: though not every bit is: float convolutions of random networks went down to 0.9987 (tools/coverage.py).
SAME_CLASS, SAME_COSINE = 0.998, 0.995


@dataclass(frozen=True, repr=False)
class VerifyReport(Tabular):
    """How the file behaves in ONNX Runtime against the simulation in PyTorch.

    simulation: against the converted model as it runs in PyTorch. same_functions: against the converted model with
    LayerNorm, softmax and GELU computed by ONNX Runtime's kernels (`RuntimeFunctions`): what is left then is a real
    difference between the file and the simulation. saturating: this CPU's default u8 x s8 kernels are inexact (no
    VNNI). traps: of runtimes, into which the file falls: both comparisons are of an exact session
    (`open_session(exact=True)`), and `default_agreement` tells what a plain session does.
    code_comparison: the integer codes of every site on the first images; None if not asked for. outputs: every output
    of the file by itself, under the model's own name, against the model as it runs in PyTorch. rounded: of a file that
    takes uint8, how many of the images were no such images: both sides then got the nearest ones; else None.
    """

    simulation: Comparison
    same_functions: Comparison
    graph: RuntimeGraph
    saturating: bool
    default_agreement: float
    code_comparison: Layers | None
    outputs: Mapping[str, Comparison] = field(default_factory=dict)
    rounded: int | None = None
    traps: tuple[Trap, ...] = ()

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

    @property
    def on_pixels(self) -> str:
        """What a file that takes uint8 images was compared on; "" of another file."""
        if self.rounded is None:
            return ""
        which = f"{self.rounded} of them rounded to uint8 on both sides" if self.rounded else "all of them exactly such"
        return f"the file takes uint8 images: {which}"

    def brief(self) -> str:
        """Return whether the file computes what was simulated, and on how many images to the last bit."""
        same = self.same_functions
        says = "the file computes the simulation" if self.ok else "the file does NOT compute the simulation"
        return f"{says}, bit-equal on {same.bit_equal:.1%} of {same.images} images"

    def records(self) -> list[dict[str, Any]]:
        """Return the comparison of the codes of every site, JSON-ready; nothing if layers were not compared."""
        return list(map(asdict, self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers behind the report, JSON-ready; the file's nodes and sites are those of `inspect`."""
        first = self.first_divergence
        return {
            "ok": self.ok,
            "images": self.images,
            "same_functions": asdict(self.same_functions),
            "simulation": asdict(self.simulation),
            "rounded": self.rounded,
            "saturating": self.saturating,
            "traps": list(map(asdict, self.traps)),
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
        if self.on_pixels:
            lines.append(f"  {self.on_pixels}")
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
        lines += [f"  trap: {trap}" for trap in self.traps]
        if self.saturating:
            lines.append("  this CPU has no VNNI: the default u8 x s8 kernels saturate")
        if self.saturating or any(trap.kernel for trap in self.traps):
            lines.append(f"  a session with the runtime's defaults agrees on {self.default_agreement:.2%}")
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


@dataclass(frozen=True)
class _Seen:
    """The batches, and who is told how many of their images each side has seen."""

    batches: list[Inputs]
    progress: Show

    def __call__(self, side: str) -> Iterator[Inputs]:
        count = sum(len(batch[0]) for batch in self.batches)
        return counted(self.batches, self.progress, f"verify: {side}", count)


@independent_of_caller()
def verify_onnx(
    path: str | os.PathLike[str],
    converted: GraphModule,
    data: Any,
    *,
    layers: int = 8,
    images: int | None = None,
    progress: Show = show_nothing,
) -> VerifyReport:
    """Run the file in ONNX Runtime and the converted model in PyTorch on the same images; return the comparison.

    data, images: as for `calibrate`. layers: number of images, the first ones, on which the integer codes of every
    site are compared too, 0 for none. progress: is called with what is under way. Raises PTQError if the file cannot be
    read or the images do not fit.
    """
    converted = model_at(Stage.CONVERTED, converted, "verify_onnx", "call convert_fx(prepared) first")
    batches = batches_for(converted, data, "verify_onnx", images=images)
    saturating = products_saturate()
    session = open_session(path)
    with unreadable("verify_onnx", path, "a graph of products"):
        model = load_file(path)
        graph = runtime_graph(model)
        traps = traps_met(model, graph, saturates=saturating)
    check_runs("verify_onnx", path, traps)
    pixels = pixels_of(session, str(path), "verify_onnx")
    rounded = None
    if pixels is not None and all(map(pixels.fit, batches)):
        batches, rounded = pixels.rounded(batches)
    device = next((buffer.device for buffer in converted.buffers()), torch.device("cpu"))
    seen = _Seen(batches, progress)
    simulated = outputs_of_model(lambda *x: run(converted, x, "verify_onnx"), seen("the simulation"), device)
    here = on_cpu(converted)
    alike = outputs_of_model(RuntimeFunctions(here).run, seen("the runtime's functions"), torch.device("cpu"))
    actual = outputs_of_file(str(path), session, seen("the file"), list(simulated))
    plain = open_session(path, exact=False) if saturating or any(trap.kernel for trap in traps) else None
    default = actual if plain is None else outputs_of_file(str(path), plain, batches, list(simulated))
    _check_sizes(str(path), simulated, actual)
    progress(UnderWay("verify: layer by layer"))
    return VerifyReport(
        simulation=compare_outputs(simulated, actual),
        same_functions=compare_outputs(alike, actual),
        graph=graph,
        saturating=saturating,
        default_agreement=compare_outputs(simulated, default).agreement,
        code_comparison=compare_layers(here, path, session, batches, layers) if layers > 0 else None,
        outputs={name: compare(simulated[name], array) for name, array in actual.items()},
        rounded=rounded,
        traps=traps,
    )
