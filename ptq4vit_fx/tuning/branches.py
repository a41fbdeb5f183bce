"""One batch through the model, once for each way in which a single product is quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ptq4vit_fx.calibrating.capture import recording
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.export.proof.outputs import as_array
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.dataflow import overwrites
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.observer import ProductObserver
from ptq4vit_fx.passes.graph.outputs import tensor_outputs
from ptq4vit_fx.passes.graph.running import run

Array = NDArray[Any]


@dataclass(frozen=True)
class Branch:
    """The outputs where one product alone is quantized, by the calibration of this number; share: of a forward."""

    product: str
    number: int
    outputs: dict[str, Array]
    share: float


@torch.no_grad()
def branches(observed: GraphModule, batch: Inputs, tried: Mapping[str, Sequence[Calibration]]) -> Iterator[Branch]:
    """Yield what comes out of an observed model on a batch, for each product and each of its calibrations.

    What lies in front of a product is computed once for all of them.
    """
    if any(overwrites(node) for node in observed.graph.nodes):  # two runs cannot share what is written into
        for name, calibrations in tried.items():
            for number, calibration in enumerate(calibrations):
                own = {name: calibration}
                with recording(observed, own, recorder(own)), exclusive():
                    output = run(observed, placed(observed, batch), "tune")
                yield Branch(name, number, arrays(output), 1.0)
        return
    nodes = list(observed.graph.nodes)
    front = _Part(observed, placed(observed, batch))
    for place, node in enumerate(nodes):
        product = _product(observed, node)
        for number, calibration in enumerate(tried.get(product, ()) if product else ()):
            with exclusive():
                output = front.branch(nodes[place:], node, calibration)
            yield Branch(str(product), number, arrays(output), (len(nodes) - place) / len(nodes))
        with exclusive():
            front.go([node])


def placed(observed: GraphModule, batch: Inputs) -> Inputs:
    """Return a batch on the device of the model."""
    device = next((parameter.device for parameter in observed.parameters()), torch.device("cpu"))
    return tuple(x.to(device) for x in batch)


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


def recorder(calibrations: Mapping[str, Calibration]) -> Any:
    """Return what makes the observers of these products give quantized outputs."""

    def quantized(name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        return calibrations[name].product(name, lhs, rhs, bias).to(out.dtype)

    return quantized


def arrays(output: Any) -> dict[str, Array]:
    """Return the outputs of a forward by their names."""
    return {name: as_array(x) for name, x in tensor_outputs(output).items()}
