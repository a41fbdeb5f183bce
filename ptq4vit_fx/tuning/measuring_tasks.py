"""What single products cost, measured on the workers of an executor: a batch of images is a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from torch.fx import GraphModule

from ptq4vit_fx.calibrating.dispatch import answers
from ptq4vit_fx.calibrating.worker_state import write_state
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.files import scratch
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.torch_state import computing_with, intra_op_threads
from ptq4vit_fx.tuning.branches import Branch, branches

#: A product and the calibrations that it alone is quantized by, one after the other.
Tried = Mapping[str, Sequence[Calibration]]


@dataclass(frozen=True)
class SharedBranches:
    """What every worker has; threads: that a forward uses, on which the last bits of a sum depend."""

    observed: GraphModule
    batches: list[Inputs]
    tried: Tried
    threads: int


@dataclass(frozen=True)
class BranchTask:
    """Measure everything on one batch."""

    number: int

    def __str__(self) -> str:
        return f"batch {self.number} of the images to measure on"

    def __call__(self, shared: SharedBranches) -> tuple[int, list[Branch]]:
        """Run on a worker; return the number of the batch, and what came out."""
        with computing_with(shared.threads):
            return self.number, list(branches(shared.observed, shared.batches[self.number], shared.tried))


def branches_elsewhere(
    observed: GraphModule, batches: list[Inputs], tried: Tried, executor: Executor
) -> Iterator[tuple[int, list[Branch]]]:
    """Yield the number of each batch, and what comes out there, as workers finish.

    Nothing is summed on a worker: outputs come back image by image, and whoever puts them in the order of the batches
    gets the same sums as on one machine. Raises PTQError as `answers`.
    """
    shared = SharedBranches(observed, batches, tried, intra_op_threads())
    size = sum(x.nbytes for x in (*observed.state_dict().values(), *sum(batches, ())))
    with scratch("tune", size) as folder:
        file = write_state(shared, folder / "state.pt", "tune")
        for answer in answers(executor, file, [BranchTask(number) for number in range(len(batches))], "tune"):
            yield answer.value
