"""How long products take, float and as integers: measured here, or read from a file that another machine wrote."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import onnxruntime

from ptq4vit_fx.errors import failure
from ptq4vit_fx.export.proof.instructions import cpu_instructions
from ptq4vit_fx.export.proof.product_timing import ProductShapes, measure_branches
from ptq4vit_fx.export.targets import TARGETS
from ptq4vit_fx.files import check_readable
from ptq4vit_fx.inputs.records import Place, read_as, read_json

FORMAT = "ptq4vit_fx timings 1"
#: Branches on the left of a product whose seconds a file has: float, one grid, the two of a twin.
BRANCHES = (0, 1, 2)


@dataclass(frozen=True)
class ProductSeconds:
    """Seconds of one run of a product: in float, as one integer product, as the two of a twin."""

    shapes: ProductShapes
    seconds: tuple[float, float, float]


@dataclass(frozen=True)
class Timings:
    """Seconds of the products of a model on one machine.

    target: what they are of. machine: the CPU and its instruction sets. runtime: name and version. images: at a time.
    model: whose products these are, for those who read the file.
    """

    target: str
    machine: str
    runtime: str
    images: int
    products: tuple[ProductSeconds, ...]
    model: str = ""
    format: str = field(default=FORMAT)

    def seconds(self, shapes: ProductShapes, branches: int) -> float:
        """Return the seconds of a product per image; raises PTQError if it is none of this model's."""
        for product in self.products:
            if product.shapes == shapes:
                return product.seconds[branches] / self.images
        found = f"{len(self.products)} others{f', of {self.model}' if self.model else ''}"
        expected = f"a {shapes.kind} of {shapes.lhs} and {shapes.rhs}"
        do = "measure this model at this image size and batch: ptq4vit timings MODEL"
        raise failure("tune", "timings", expected=expected, got=found, do=do)

    @property
    def elsewhere(self) -> bool:
        """Whether another machine, or another version of the runtime, is what they were measured on."""
        return (self.machine, self.runtime) != (this_machine(), this_runtime())

    def facts(self) -> dict[str, Any]:
        """Return where they are from, JSON-ready."""
        return {"target": self.target, "machine": self.machine, "runtime": self.runtime, "images": self.images}

    def to_json(self) -> str:
        """Return them as JSON text; `load_timings` reads a file of it."""
        return json.dumps(asdict(self), indent=1)


def this_machine() -> str:
    """Return the CPU of this machine, its instruction sets and how many cores the process may use."""
    found = cpu_instructions()
    sets = ", ".join(found.found or ()) or "instruction sets unknown"
    return f"{found.cpu}, {sets}, {platform.system()}, {os.cpu_count()} cores"


def this_runtime() -> str:
    """Return the runtime that measures, with its version."""
    return f"ONNX Runtime {onnxruntime.__version__}"


def measure_timings(
    shapes: Iterable[ProductShapes],
    target: str,
    images: int,
    *,
    model: str = "",
    measure: Callable[[ProductShapes], tuple[float, ...]] | None = None,
) -> Timings:
    """Return the seconds of these products in ONNX Runtime here; raises PTQError if that is not what runs the target.

    images: that the shapes are of. measure: product -> seconds of every one of BRANCHES, in place of that.
    """
    if measure is None and not TARGETS[target].measured:
        here = ", ".join(name for name, own in TARGETS.items() if own.measured)
        do = f"measure it elsewhere and pass timings=, or choose {here}"
        got, expected = "none: ONNX Runtime is not what runs its files", "timings of its products"
        raise failure("tune", f"target {target}", expected=expected, got=got, do=do)
    measured = []
    for product in dict.fromkeys(shapes):
        plain, one, two = (measure or (lambda known: measure_branches(known, BRANCHES)))(product)
        measured.append(ProductSeconds(product, (plain, one, two)))
    return Timings(target, this_machine(), this_runtime(), images, tuple(measured), model)


def load_timings(path: str | os.PathLike[str], operation: str = "tune") -> Timings:
    """Read a file of `ptq4vit timings`; raises PTQError on anything else."""
    name = os.fspath(path)
    readable = check_readable(name, operation, "a file of `ptq4vit timings`")
    place = Place(operation, name, do="write it with `ptq4vit timings MODEL`")
    try:
        text = readable.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise place.refusal("JSON", str(error)) from error
    found: Timings = read_as(Timings, read_json(text, place), place)
    if found.format != FORMAT:
        raise place.refusal(FORMAT, repr(found.format))
    if found.images < 1 or not all(0 < s < float("inf") for p in found.products for s in p.seconds):
        raise place.refusal("positive seconds and one image or more", "others")
    return found


def at_batch(shapes: Mapping[str, ProductShapes], images: int, batch: int) -> dict[str, ProductShapes]:
    """Return the shapes of products of `images` at once for `batch` of them: what comes first counts images."""

    def larger(size: tuple[int, ...]) -> tuple[int, ...]:
        return (size[0] * batch // images, *size[1:]) if size else size

    return {
        name: ProductShapes(
            *(own.kind, larger(own.lhs), own.rhs if own.rhs_is_weight else larger(own.rhs), own.rhs_is_weight)
        )
        for name, own in shapes.items()
    }
