"""What becomes of the output when products are quantized: measured on images, the rest of the model in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ptq4vit_fx.calibrating.capture import recording
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.export.proof.against_float import AgainstFloat, Kind
from ptq4vit_fx.export.proof.float_figures import against_float, decide
from ptq4vit_fx.export.proof.outputs import Images, as_array
from ptq4vit_fx.inputs.batches import FIXED_BATCH
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.apply_balances import apply_balances
from ptq4vit_fx.passes.graph.contract import sharing_tensors
from ptq4vit_fx.passes.graph.dataflow import overwrites
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.observer import ProductObserver
from ptq4vit_fx.passes.graph.outputs import tensor_outputs
from ptq4vit_fx.passes.graph.running import run

Array = NDArray[Any]
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
    """

    observed: GraphModule
    batches: list[Inputs]
    kind: Kind | None
    labels: Tensor | None
    float_outputs: dict[str, Array] = field(default_factory=dict)
    passes: float = 0.0

    @staticmethod
    def of(
        prepared: GraphModule,
        calibration: Calibration,
        batches: list[Inputs],
        kind: Kind | None = None,
        labels: Tensor | None = None,
    ) -> Measuring:
        """Return a measuring of a prepared model, its channels balanced as the calibration says."""
        observed = apply_balances(sharing_tensors(prepared), calibration.balances)
        measuring = Measuring(observed, batches, kind, labels)
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
        return Measuring(self.observed, kept, self.kind, None, outputs)

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
        for batch in self.batches:
            for name, number, output in self._branches(batch, tried):
                size = len(batch[0])
                tell(name, size / self.images)
                collected[name][number].add(_arrays(output), size, size)
        for name, several in collected.items():
            yield name, [divergence(self._against(images.outputs())) for images in several]

    def _outputs(self, calibrations: Mapping[str, Calibration]) -> dict[str, Array]:
        collected = Images("the model", "tune")
        with recording(self.observed, calibrations, _recorder(calibrations)), torch.no_grad():
            for batch in self.batches:
                with exclusive():
                    output = run(self.observed, self._placed(batch), "tune")
                collected.add(_arrays(output), len(batch[0]), len(batch[0]))
        self.passes += self.images / PASS_IMAGES
        return collected.outputs()

    def _against(self, outputs: Mapping[str, Array]) -> AgainstFloat:
        return against_float(self.float_outputs, outputs, kind=self.kind, unseen=True)

    def _placed(self, batch: Inputs) -> Inputs:
        device = next((parameter.device for parameter in self.observed.parameters()), torch.device("cpu"))
        return tuple(x.to(device) for x in batch)

    @torch.no_grad()
    def _branches(self, batch: Inputs, tried: Mapping[str, Sequence[Calibration]]) -> Iterator[tuple[str, int, Any]]:
        size = len(batch[0]) / PASS_IMAGES
        if any(overwrites(node) for node in self.observed.graph.nodes):  # two runs cannot share what is written into
            for name, calibrations in tried.items():
                for number, calibration in enumerate(calibrations):
                    own = {name: calibration}
                    with recording(self.observed, own, _recorder(own)), exclusive():
                        output = run(self.observed, self._placed(batch), "tune")
                    self.passes += size
                    yield name, number, output
            return
        nodes = list(self.observed.graph.nodes)
        front = _Part(self.observed, self._placed(batch))
        for place, node in enumerate(nodes):
            product = _product(self.observed, node)
            for number, calibration in enumerate(tried.get(product, ()) if product else ()):
                with exclusive():
                    output = front.branch(nodes[place:], node, calibration)
                self.passes += size * (len(nodes) - place) / len(nodes)
                yield str(product), number, output
            with exclusive():
                front.go([node])
        self.passes += size


class _Part(Interpreter):
    """A graph that is run node by node; `branch` goes on from where it is, with one product quantized."""

    def __init__(self, graph_module: GraphModule, inputs: Inputs) -> None:
        super().__init__(graph_module)
        self.args_iter = iter(inputs)

    def go(self, nodes: Iterable[Node]) -> Any:
        """Run nodes, forget what nobody reads any more, and return the value of the last one."""
        value = None
        for node in nodes:
            value = self.env[node] = self.run_node(node)
            for done in self.user_to_last_uses.get(node, []):
                del self.env[done]
        return value

    def branch(self, rest: Sequence[Node], observer: Node, calibration: Calibration) -> Any:
        """Return the output where the product of an observer, the first of these nodes, is quantized."""
        before = self.env
        self.env = dict(before)
        try:
            lhs, rhs, bias, out = self.fetch_args_kwargs_from_env(observer)[0]
            name = str(_product(self.module, observer))
            self.env[observer] = calibration.product(name, lhs, rhs, bias).to(out.dtype)
            for done in self.user_to_last_uses.get(observer, []):
                del self.env[done]
            return self.go(rest[1:])
        finally:
            self.env = before


def _product(graph_module: Any, node: Node) -> str | None:
    """Return the product that a node observes."""
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module.op_name if isinstance(module, ProductObserver) else None


def _recorder(calibrations: Mapping[str, Calibration]) -> Any:
    def quantized(name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        return calibrations[name].product(name, lhs, rhs, bias).to(out.dtype)

    return quantized


def _arrays(output: Any) -> dict[str, Array]:
    return {name: as_array(x) for name, x in tensor_outputs(output).items()}


def divergence(against: AgainstFloat) -> float:
    """Return what quantization costs: the mean KL in nats of classes, of any other output half its squared error.

    Both are second-order in the change of the output; the error is relative to the output's energy.
    """
    if against.divergence is not None:
        return min(against.divergence, WORST)
    error = against.closeness.relative_error
    return min(0.5 * error * error, WORST) if np.isfinite(error) else WORST
