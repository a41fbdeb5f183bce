"""What a float model computes, measured before it is traced: what is quantized must compute the same."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ptq4vit_fx.errors import PTQError, failure
from ptq4vit_fx.passes.graph.autocasting import autocast_left_out
from ptq4vit_fx.passes.graph.causes import rejected
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.model_call import ModelCall
from ptq4vit_fx.passes.graph.outputs import is_dense
from ptq4vit_fx.passes.graph.randomness import RandomCalls, drawn, generator_states, is_alone, random_numbers_kept
from ptq4vit_fx.torch_state import without_fast_attention

#: Where a traced GraphModule keeps the Behaviour of its model until it is prepared.
BEHAVIOUR = "ptq4vit_behaviour"

#: Root mean square of the difference, relative to that of the output. Another order of summation in float32 changes
#: the families of tools/families.py by less than 1e-5; a lost layer, hook or output changes a model by far more.
DIFFERENCE = 1e-3
#: What decides (the best queries of a detector) multiplies the last bit: a difference of so many times what the model
#: itself makes of a change in the last bit of its inputs is none.
AMPLIFIED = 30.0
LAST_BIT = 2.0**-22

#: So many forwards of the same images are compared where generators have moved: a draw decides now and then only.
REPEATED = 16

#: Rows of the second batch, or two for an example of as many.
ROWS = 3


@dataclass(frozen=True)
class Run:
    """Inputs, and the tensors that the model gives."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Behaviour:
    """A model, how it is called, and what it computes: on the example, and on another batch size if it takes one."""

    model: nn.Module
    call: ModelCall
    runs: tuple[Run, ...]

    @property
    def fixed_batch(self) -> int | None:
        """The batch size of the example, if the model takes no other."""
        return len(self.runs[0].inputs[0]) if len(self.runs) == 1 else None

    def difference(self, graph_module: GraphModule) -> str | None:
        """Return in words what a graph computes otherwise, None if it computes the same."""
        for run in self.runs:
            on = f"on a batch of {len(run.inputs[0])}"
            try:
                with measuring(self.model):
                    outputs = tensors_of(graph_module(*(x.clone() for x in run.inputs)))
            except Exception as error:  # noqa: BLE001 - whatever it raises, the model does not
                return f"{type(error).__name__} {on}: {error}".splitlines()[0]
            if [x.shape for x in outputs] != [x.shape for x in run.outputs]:
                shapes = [", ".join(str(tuple(x.shape)) for x in found) for found in (outputs, run.outputs)]
                return f"outputs of shape {shapes[0]} instead of {shapes[1]} {on}"
            far = distance(outputs, run.outputs)
            if not far <= DIFFERENCE and not far <= AMPLIFIED * self._made_of_the_last_bit(run):
                return f"outputs that differ by {far:.2g} of their size {on}"
        return None

    def _made_of_the_last_bit(self, run: Run) -> float:
        moved = tuple(x * (1 + LAST_BIT) if x.is_floating_point() else x.clone() for x in run.inputs)
        with measuring(self.model):
            return distance(tensors_of(self.call(self.model, *moved)), run.outputs)


def sizes_on_another_batch(graph_module: GraphModule, nodes: Collection[Node]) -> dict[Node, torch.Size]:
    """Return the shapes of some nodes' tensors on another batch size; {} if the model takes but the example's."""
    behaviour: Behaviour | None = graph_module.meta.get(BEHAVIOUR)
    if behaviour is None or behaviour.fixed_batch is not None:
        return {}
    sizes: dict[Node, torch.Size] = {}

    class Sizes(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n in nodes:
                sizes[n] = result.shape
            return result

    with measuring(behaviour.model):
        Sizes(graph_module).run(*(x.clone() for x in behaviour.runs[1].inputs))
    return sizes


def check_behaviour(graph_module: GraphModule) -> None:
    """Raise PTQError if a prepared graph computes something else than the model that it was traced from.

    What the model computes is forgotten then. A graph that was traced without an example has nothing to be compared to.
    """
    behaviour: Behaviour | None = graph_module.meta.pop(BEHAVIOUR, None)
    difference = behaviour and behaviour.difference(graph_module)
    if behaviour is not None and difference:
        raise failure(
            "prepare_fx",
            type(behaviour.model).__name__,
            expected="a prepared graph that computes what the model computes",
            got=difference,
            do="keep the module in which it begins closed with leaf_modules=, and report this as a bug in a pass",
        )


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run a model as it is traced: without gradients, autocast, fused layers; random numbers stay the caller's."""
    with exclusive(), random_numbers_kept(model), torch.no_grad(), without_fast_attention(), autocast_left_out():
        yield


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """Return the tensors of an output, whatever holds them."""
    return tuple(x for x in tree_leaves(output) if isinstance(x, Tensor))


def distance(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest difference of tensors of the same shapes: its root mean square over that of the expected one.

    Infinity where a finite value became none, or where more than one in a hundred integers differ. Values that are not
    finite in the model are not compared, and a tensor of next to nothing is compared with the largest of all.
    """
    sizes = [_size(x) for x in expected]
    least = max(1e-3 * max(sizes, default=0.0), 1e-12)
    pairs = zip(outputs, expected, sizes, strict=True)
    return max((_difference(a, b) / max(size, least) for a, b, size in pairs), default=0.0)


def _size(x: Tensor) -> float:
    return _rms(x[torch.isfinite(x)]) if x.is_floating_point() else 1.0


def _difference(output: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point():
        return float("inf") if (output != expected).sum() > max(1, expected.numel() // 100) else 0.0
    finite = torch.isfinite(expected)
    difference = output[finite].double() - expected[finite].double()
    return _rms(difference) if torch.isfinite(difference).all() else float("inf")


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def behaviour_of(model: nn.Module, example: Sequence[Tensor], call: ModelCall) -> Behaviour:
    """Run a model on the example, and on other rows made of it.

    model: a copy that nobody else uses. Raises PTQError if it does not take the example, and if two forwards of the
    same images differ: nothing can be compared with a model that is random.
    """
    device = next((p.device for p in model.parameters()), example[0].device)
    inputs = tuple(x.detach().to(device, torch.float32 if x.is_floating_point() else x.dtype).clone() for x in example)
    try:
        with measuring(model):
            before = generator_states(model)
            output = replace(call, keys=True)(model, *(x.clone() for x in inputs))
            after = generator_states(model)
            call = replace(call, keys=is_dense(output))
            first = Run(inputs, tensors_of(output))
            differs = any(_differ(_run(model, call, inputs), first) for _ in range(1 if after == before else REPEATED))
    except PTQError:
        raise
    except Exception as error:
        raise rejected(model, inputs, error) from error
    if not first.outputs:
        got, do = f"an output without one, {type(output).__name__}", "return the tensors that the model computes"
        raise failure("prepare_fx", type(model).__name__, expected="a tensor in the output", got=got, do=do)
    generator = drawn(before, after)
    if differs or (generator and is_alone()):
        raise _random(model, call, inputs, generator)
    try:
        with measuring(model):
            second = _run(model, call, other_rows(inputs))
    except Exception:  # noqa: BLE001 - whatever it is, it is about a batch that the example does not have
        return Behaviour(model, call, (first,))
    return Behaviour(model, call, (first, second))


def _run(model: nn.Module, call: ModelCall, inputs: tuple[Tensor, ...]) -> Run:
    return Run(inputs, tensors_of(call(model, *(x.clone() for x in inputs))))


def other_rows(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a batch of another size whose rows differ from each other, within the range of the example's values.

    Rows are rolled along the last dimension, so that images that are mixed across a batch show up; an example without
    contrast (zeros, ones) gets some. Integers and masks are repeated as they are: only these are known to be valid.
    """
    rows = len(inputs[0])
    numbers = [i % rows for i in range(ROWS if rows != ROWS else ROWS - 1)]
    generator = torch.Generator().manual_seed(0)
    return tuple(_other_rows(x[numbers], generator) for x in inputs)


def _other_rows(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_floating_point() or x.ndim < 2:
        return x
    if x.isfinite().all() and x.std() < 1e-6 + 1e-3 * x.abs().max():
        x = x + torch.randn(x.shape, generator=generator).to(x)
    return torch.stack([row.roll(number, -1) * (1 - number / 8) for number, row in enumerate(x)])


def _differ(run: Run, first: Run) -> bool:
    if [x.shape for x in run.outputs] != [x.shape for x in first.outputs]:
        return True
    return distance(run.outputs, first.outputs) > DIFFERENCE


def _random(model: nn.Module, call: ModelCall, inputs: tuple[Tensor, ...], generator: str) -> PTQError:
    """Return the error of a model that computes something else each time; generator: that it draws from, if known."""
    with measuring(model), RandomCalls(model) as calls:
        call(model, *(x.clone() for x in inputs))
    got = "two outputs for the same images, without a random operator of torch"
    do = "take out what it keeps from one forward to the next, or draws from numpy or random"
    if generator:
        got, do = f"a forward that draws from {generator}", "switch that off in evaluation mode (if self.training: ...)"
    elif calls.found:
        got = f"two outputs for the same images: {calls.found[0]}"
        do = "switch that off in evaluation mode (F.dropout takes training=self.training)"
    expected = "a model that computes the same twice in evaluation mode"
    return failure("prepare_fx", type(model).__name__, expected=expected, got=got, do=do)
