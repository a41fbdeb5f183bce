"""What a file gives beside what its model gives: every output under the model's own name, image by image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from torch import Tensor

from ptq4vit_fx.errors import PTQError, failure, reason_of
from ptq4vit_fx.export.metadata import own_outputs
from ptq4vit_fx.export.pixels import pixels_of
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.outputs import tensor_outputs

Array = NDArray[Any]


@dataclass
class Images:
    """Outputs of several forwards, collected; `outputs()` has them image by image."""

    subject: str
    operation: str = "verify_onnx"
    forwards: list[dict[str, Array]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def add(self, forward: Mapping[str, Array], size: int, kept: int) -> None:
        """Add one forward of `size` images, of which the first `kept` count."""
        self.forwards.append(dict(forward))
        self.sizes.append(size)
        self.kept.append(kept)

    def outputs(self) -> dict[str, Array]:
        """Return name -> (images, ...); what has no batch, as a table, is every image's: (images, 1, values)."""
        return {name: self._rows(name) for name in self.forwards[0]}

    def _rows(self, name: str) -> Array:
        arrays = [forward[name] for forward in self.forwards]
        pairs = list(zip(arrays, self.sizes, strict=True))
        if all(x.ndim and len(x) % size == 0 for x, size in pairs) and len({x.size / size for x, size in pairs}) == 1:
            rows = [x if len(x) == size else x.reshape(size, -1) for x, size in pairs]
        elif len({x.size for x in arrays}) == 1:
            rows = [np.broadcast_to(x.reshape(1, 1, -1), (size, 1, x.size)) for x, size in pairs]
        else:
            raise failure(
                self.operation,
                f"output {name} of {self.subject}",
                expected="as many values for every image",
                got=", ".join(str(x.shape) for x in arrays[:3]),
                do="leave it out with output_names=, or compare it yourself",
            )
        return np.concatenate([row[:kept] for row, kept in zip(rows, self.kept, strict=True)])


def outputs_of_model(run: Any, batches: Iterable[Inputs], device: torch.device) -> dict[str, Array]:
    """Return every output of a converted model, or of an interpreter of it, image by image."""
    images = Images("the model")
    with torch.inference_mode():
        for batch in batches:
            with exclusive():
                output = tensor_outputs(run(*(x.to(device) for x in batch)))
            images.add({name: as_array(x) for name, x in output.items()}, len(batch[0]), len(batch[0]))
    return images.outputs()


def as_array(x: Tensor) -> Array:
    """Return a tensor as an array, bfloat16 as float32."""
    return (x.float() if x.is_floating_point() else x).cpu().numpy()


def outputs_of_file(
    path: str, session: InferenceSession, batches: Iterable[Inputs], own: list[str], operation: str = "verify_onnx"
) -> dict[str, Array]:
    """Return every output of a file, image by image, under the names `own` of the converted model.

    A file of a fixed batch runs as many images at once; a last smaller batch is filled up with its last image.
    """
    names = own_names(path, session, own, operation)
    images = Images(path, operation)
    for batch, kept in pieces(batches, fixed_batch(operation, path, session)):
        results = run(operation, path, session, [x.cpu().numpy() for x in batch])
        images.add(dict(zip(names, results, strict=True)), len(batch[0]), kept)
    return images.outputs()


def run(operation: str, path: str, session: InferenceSession, inputs: Sequence[Array]) -> list[Array]:
    """Return the outputs of a file; inputs: its own, in their order; of a file of uint8 images the floats will do.

    Raises PTQError if the runtime refuses them or fails, and on outputs that are no arrays of numbers.
    """
    pixels = pixels_of(session, path, operation)
    if pixels is not None and pixels.fit(inputs):
        inputs = [pixels.pixels(torch.from_numpy(inputs[0]))]
    try:
        entries = [entry.name for entry in session.get_inputs()]
        results: list[Array] = session.run(None, dict(zip(entries, inputs, strict=True)))
    except Exception as error:
        raise _refused(operation, path, session, inputs, error) from error
    for entry, result in zip(session.get_outputs(), results, strict=True):
        if not isinstance(result, np.ndarray) or result.dtype.kind not in "fiub":
            do = "export it with output_names= of the others"
            raise failure(operation, f"{path}: output {entry.name}", expected="numbers", got=entry.type, do=do)
    return results


def fixed_batch(operation: str, path: str, session: InferenceSession) -> int | None:
    """Return the only number of images that a file takes, None if it takes any.

    Raises PTQError on a file without inputs, and on a number below 1.
    """
    shapes = [entry.shape for entry in session.get_inputs()]
    size = shapes[0][0] if shapes and shapes[0] else None
    if not shapes or (isinstance(size, int) and size < 1):
        got = f"inputs of shape {' and '.join(map(str, shapes))}" if shapes else "no inputs"
        do = "export it again from an example of one image or more"
        raise failure(operation, path, expected="a file that takes images", got=got, do=do)
    return size if isinstance(size, int) else None


def own_names(path: str, session: InferenceSession, own: list[str], operation: str = "verify_onnx") -> list[str]:
    """Return the names that the outputs of a file have in the converted model: by what it says, or by their order."""
    found = [entry.name for entry in session.get_outputs()]
    said = own_outputs(session.get_modelmeta().custom_metadata_map, operation, path)
    names = [said.get(name, name) for name in found]
    if set(names) <= set(own) and len(set(names)) == len(names) > 0:
        return names
    if len(found) == len(own):
        return own
    do = "export this model again"
    raise failure(operation, path, expected=f"outputs {', '.join(own)}", got=", ".join(found), do=do)


def pieces(batches: Iterable[Inputs], size: int | None) -> Iterator[tuple[Inputs, int]]:
    """Yield batches as a file of such a fixed batch takes them, with the number of images that count."""
    for batch in batches:
        for start in (0,) if size is None else range(0, len(batch[0]), size):
            part = batch if size is None else tuple(x[start : start + size] for x in batch)
            yield filled(part, size or 0), len(part[0])


def filled(batch: Inputs, size: int) -> Inputs:
    """Return a batch of at least `size` images: the last one repeats."""
    missing = max(0, size - len(batch[0]))
    return tuple(torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in batch) if missing else batch


def _refused(
    operation: str, path: str, session: InferenceSession, inputs: Sequence[Array], error: Exception
) -> PTQError:
    given, reason = ", ".join(str(x.shape) for x in inputs), reason_of(error)
    if isinstance(error, (InvalidArgument, ValueError)):
        given = ", ".join(f"{x.shape} {x.dtype}" for x in inputs)
        wanted = ", ".join(f"{entry.name} {entry.shape} {entry.type}" for entry in session.get_inputs())
        do = "pass images of the size that was exported"
        return failure(operation, path, expected=f"inputs of shape {wanted}", got=f"{given} ({reason})", do=do)
    do = "look at that node in the file; if it is a reshape that fixes the number of images, export with batch="
    return failure(operation, path, expected=f"a file that runs on inputs {given}", got=reason, do=do)
