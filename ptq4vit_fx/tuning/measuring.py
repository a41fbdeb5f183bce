"""What becomes of the output when products are quantized: measured on images, the rest of the model in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.calibrating.capture import recording
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.export.proof.against_float import AgainstFloat, Kind
from ptq4vit_fx.export.proof.float_figures import against_float, decide
from ptq4vit_fx.export.proof.outputs import Images
from ptq4vit_fx.inputs.batches import FIXED_BATCH
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.apply_balances import apply_balances
from ptq4vit_fx.passes.graph.contract import sharing_tensors
from ptq4vit_fx.passes.graph.dataflow import overwrites
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.running import run
from ptq4vit_fx.tuning.branches import Array, Branch, arrays, branches, placed, recorder
from ptq4vit_fx.tuning.measuring_tasks import branches_elsewhere

#: Is told a product, and which part of one measurement of it is done.
Tell = Callable[[str, float], None]
#: Images of a forward pass as costs of measuring count them.
PASS_IMAGES = 32
#: A divergence above this is no longer told apart: the model answers at random.
WORST = 100.0


@dataclass
class Measuring:
    """The float model on images that calibration has not seen, and the same with products quantized.

    passes: how many forwards of PASS_IMAGES images were run so far, parts of one counted as parts.
    executor: whose workers measure single products, a batch each.
    """

    observed: GraphModule
    batches: list[Inputs]
    kind: Kind | None
    labels: Tensor | None
    float_outputs: dict[str, Array] = field(default_factory=dict)
    passes: float = 0.0
    executor: Executor | None = None

    @staticmethod
    def of(
        prepared: GraphModule,
        calibration: Calibration,
        batches: list[Inputs],
        kind: Kind | None = None,
        labels: Tensor | None = None,
        executor: Executor | None = None,
    ) -> Measuring:
        """Return a measuring of a prepared model, its channels balanced as the calibration says."""
        observed = apply_balances(sharing_tensors(prepared), calibration.balances)
        measuring = Measuring(observed, batches, kind, labels, executor=executor)
        measuring.float_outputs = measuring._outputs({})
        return measuring

    def on_few(self, images: int) -> Measuring:
        """Return the measuring on the first images alone, so many, in whole batches where the model takes no others."""
        kept, count = list[Inputs](), 0
        fixed = self.observed.meta.get(FIXED_BATCH)
        for batch in self.batches:
            room = images - count if fixed is None or not kept else (images - count) // fixed * fixed
            if room <= 0:
                break
            kept.append(tuple(x[:room] for x in batch) if fixed is None else batch)
            count += len(kept[-1][0])
        outputs = {name: x[:count] for name, x in self.float_outputs.items()}
        return Measuring(self.observed, kept, self.kind, None, outputs, executor=self.executor)

    @property
    def images(self) -> int:
        """How many images there are."""
        return sum(len(batch[0]) for batch in self.batches)

    def whole(self, calibrations: Mapping[str, Calibration]) -> AgainstFloat:
        """Return how far the model is from float with these products quantized, each as its calibration says."""
        return self._against(self._outputs(calibrations))

    def right(self, calibrations: Mapping[str, Calibration] | None = None) -> float:
        """Return the share of the images whose label has the largest logit; without calibrations, in float."""
        assert self.labels is not None
        outputs = self.float_outputs if calibrations is None else self._outputs(calibrations)
        name, _, _ = decide(self.float_outputs, self.kind, None)
        return float((outputs[name].argmax(-1) == self.labels.numpy()).mean())

    def alone(
        self, tried: Mapping[str, Sequence[Calibration]], tell: Tell = lambda name, share: None
    ) -> Iterator[tuple[str, list[float]]]:
        """Yield each product with the divergence of the output where it alone is quantized, as each of these say.

        What lies in front of a product is computed once for all of them. tell: is told the product that is being
        measured, and which part of one measurement is done.
        """
        collected: dict[str, list[Images]] = {
            name: [Images("the model", "tune") for _ in own] for name, own in tried.items()
        }
        for batch, found in zip(self.batches, self._branches(tried, tell), strict=True):
            size = len(batch[0])
            for branch in found:
                collected[branch.product][branch.number].add(branch.outputs, size, size)
        for name, several in collected.items():
            yield name, [divergence(self._against(images.outputs())) for images in several]

    def _branches(self, tried: Mapping[str, Sequence[Calibration]], tell: Tell) -> Iterator[list[Branch]]:
        """Yield what comes out of each batch, in their order, wherever it is computed."""

        def counted(number: int, found: Iterable[Branch]) -> list[Branch]:
            size, kept = len(self.batches[number][0]), list[Branch]()
            for branch in found:
                tell(branch.product, size / self.images)
                self.passes += branch.share * size / PASS_IMAGES
                kept.append(branch)
            if not any(overwrites(node) for node in self.observed.graph.nodes):
                self.passes += size / PASS_IMAGES  # what they have in common
            return kept

        if self.executor is None:
            for number, batch in enumerate(self.batches):
                yield counted(number, branches(self.observed, batch, tried))
            return
        there = branches_elsewhere(self.observed, self.batches, tried, self.executor)
        done = {number: counted(number, found) for number, found in there}
        yield from (done[number] for number in range(len(self.batches)))

    def _outputs(self, calibrations: Mapping[str, Calibration]) -> dict[str, Array]:
        collected = Images("the model", "tune")
        with recording(self.observed, calibrations, recorder(calibrations)), torch.no_grad():
            for batch in self.batches:
                with exclusive():
                    output = run(self.observed, placed(self.observed, batch), "tune")
                collected.add(arrays(output), len(batch[0]), len(batch[0]))
        self.passes += self.images / PASS_IMAGES
        return collected.outputs()

    def _against(self, outputs: Mapping[str, Array]) -> AgainstFloat:
        return against_float(self.float_outputs, outputs, kind=self.kind, unseen=True)


def divergence(against: AgainstFloat) -> float:
    """Return what quantization costs: the mean KL in nats of classes, of any other output half its squared error.

    Both are second-order in the change of the output; the error is relative to the output's energy.
    """
    if against.divergence is not None:
        return min(against.divergence, WORST)
    error = against.closeness.relative_error
    return min(0.5 * error * error, WORST) if np.isfinite(error) else WORST
