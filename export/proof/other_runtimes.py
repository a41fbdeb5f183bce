"""A file in a runtime beside ONNX Runtime, which `verify_onnx` proves: all bits of outputs, the codes of every site."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from ptq4vit_fx.errors import printable, unknown_name
from ptq4vit_fx.export.model_files import load_file, save_with_data, tensors_of, unreadable
from ptq4vit_fx.export.nodes import Array
from ptq4vit_fx.export.pixels import pixels_of
from ptq4vit_fx.export.proof.comparison import Comparison, compare_outputs
from ptq4vit_fx.export.proof.layers import add_outputs
from ptq4vit_fx.export.proof.openvino_runtime import open_in_openvino
from ptq4vit_fx.export.proof.outputs import Images, fixed_batch, pieces, run
from ptq4vit_fx.export.proof.running import Opened
from ptq4vit_fx.export.proof.runtime import exact_here, exact_options, open_model, open_session, products_saturate
from ptq4vit_fx.export.proof.runtime_graph import check_runs, runtime_graph, traps_met
from ptq4vit_fx.export.proof.site_codes import CodeCount, Layers, add_counts, comparison_of, count_codes
from ptq4vit_fx.export.proof.verify import SAME_CLASS, SAME_COSINE
from ptq4vit_fx.export.proof.web_runtime import open_in_web
from ptq4vit_fx.export.stored_sites import StoredSite, integers, stored_sites
from ptq4vit_fx.export.traps import OPENVINO as OF_OPENVINO
from ptq4vit_fx.export.traps import Trap
from ptq4vit_fx.files import scratch
from ptq4vit_fx.inputs.progress import Show, UnderWay, show_nothing
from ptq4vit_fx.inputs.tensors import Inputs

OPERATION = "verify"
ONNXRUNTIME, OPENVINO, WEB = RUNTIMES = ("onnxruntime", "openvino", "web")
HERE = Path()
#: The arrays of one run, as the file takes them, and how many images of them count.
Feed = tuple[list[Array], int]
FOR_ONNXRUNTIME = (
    "the file is one for ONNX Runtime: OpenVINO finds no integer product in MatMulInteger, and computes in float; "
    "export with target='openvino'"
)


@dataclass(frozen=True)
class RuntimeReport:
    """What a runtime makes of a file, beside the reference.

    runtime, reference: their names. comparison: of the outputs, the worst of all. layers: the integer codes of every
    activation on the first images, None if they were not compared. traps: of this runtime, that the file meets. note:
    what else one should know, "" if nothing.
    """

    runtime: str
    reference: str
    comparison: Comparison
    layers: Layers | None
    traps: tuple[Trap, ...]
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the runtime computes the file: the same bits, or as far as float operators of two programs agree."""
        same = self.comparison
        return same.bit_equal == 1.0 or (same.agreement >= SAME_CLASS and same.cosine >= SAME_COSINE)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers behind the report, JSON-ready."""
        first = None if self.layers is None else self.layers.first_divergence
        sites = () if self.layers is None else self.layers.sites
        return asdict(self) | {"ok": self.ok, "first_divergence": first and first.site, "sites_compared": len(sites)}

    def __str__(self) -> str:
        lines = [f"{self.runtime} against {self.reference}, {self.comparison.images} images", f"  {self.comparison}"]
        if self.layers is not None:
            lines += [f"  {line}" for line in str(self.layers).splitlines()]
        lines += [f"  trap: {trap}" for trap in self.traps]
        return "\n".join(map(printable, [*lines, *([f"  {self.note}"] if self.note else [])]))


def verify_runtime(
    path: str | os.PathLike[str],
    batches: Iterable[Inputs],
    *,
    runtime: str,
    layers: int = 8,
    npm: Path = HERE,
    progress: Show = show_nothing,
) -> RuntimeReport:
    """Run a file in a runtime and in ONNX Runtime on the same inputs; return the comparison.

    runtime: "openvino" or "web" (onnxruntime-web in node), against ONNX Runtime on this machine, where `verify_onnx`
    compares the file with its simulation; or "onnxruntime" by its defaults, against the file as it is written, every
    node by itself. batches: of float inputs, (images, ...) each. layers: number of images, the first ones, on which the
    integer codes of every activation are compared too. npm: where onnxruntime-web is installed. progress: is told what
    is under way. Raises PTQError if the file cannot be read, or the runtime is unknown, missing, or refuses the file.
    """
    if runtime not in RUNTIMES:
        raise unknown_name(OPERATION, "--runtime", runtime, RUNTIMES)
    model, traps = _read(path, runtime)
    session = open_session(path)
    fixed = fixed_batch(OPERATION, str(path), session)
    feeds = list(_feeds(str(path), session, pieces(batches, fixed)))
    opening = _Opening(runtime, npm)
    with opening.of_file(Path(path), model) as plain:
        reference = opening.reference(model)
        sides = [_outputs(str(path), model, one, feeds, progress) for one in (reference, plain)]
        progress(UnderWay("verify: layer by layer"))
        compared = _codes(Path(path), opening, plain, feeds, layers, fixed or 1) if layers > 0 else None
    integers_alone = runtime == OPENVINO and any(node.op_type == "MatMulInteger" for node in model.graph)
    note = FOR_ONNXRUNTIME if integers_alone else ""
    return RuntimeReport(plain.name, reference.name, compare_outputs(*sides), compared, traps, note)


def _read(path: str | os.PathLike[str], runtime: str) -> tuple[ir.Model, tuple[Trap, ...]]:
    """Return what a file holds, and the traps of this runtime that it meets; raises PTQError if it cannot run there."""
    with unreadable(OPERATION, path, "a file that export_onnx wrote"):
        model = load_file(path)
        met = traps_met(model, runtime_graph(model), saturates=runtime == ONNXRUNTIME and products_saturate())
    if runtime != OPENVINO:  # the web's is ONNX Runtime, too
        check_runs(OPERATION, path, met)
    return model, tuple(trap for trap in met if (trap.runtime == OF_OPENVINO) == (runtime == OPENVINO))


@dataclass(frozen=True)
class _Opening:
    """How a file is opened in a runtime, and a model in memory in what it is compared with."""

    runtime: str
    npm: Path

    def of_file(self, path: Path, model: ir.Model) -> AbstractContextManager[Opened]:
        if self.runtime == WEB:
            return open_in_web(path, model, self.npm)
        return open_in_openvino(path) if self.runtime == OPENVINO else _open_by_default(path)

    def reference(self, model: ir.Model) -> Opened:
        """Return ONNX Runtime with exact kernels; for itself, without any optimization."""
        options, name = exact_options(), f"ONNX Runtime {onnxruntime.__version__} on this machine"
        if self.runtime == ONNXRUNTIME:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            name = "the file as it is written, node by node"
        with unreadable(OPERATION, "the file", "a model that ONNX Runtime opens"):
            return Opened(name, _run_of(open_model(exact_here(model), options=options)))


@contextmanager
def _open_by_default(path: Path) -> Iterator[Opened]:
    yield Opened(f"ONNX Runtime {onnxruntime.__version__} by its defaults", _run_of(open_session(path, exact=False)))


def _run_of(session: onnxruntime.InferenceSession) -> Callable[..., list[Array]]:
    return lambda arrays: run(OPERATION, "the file", session, arrays)


def _feeds(path: str, session: onnxruntime.InferenceSession, batches: Iterable[tuple[Inputs, int]]) -> Iterator[Feed]:
    pixels = pixels_of(session, path, OPERATION)
    for batch, kept in batches:
        if pixels is not None and pixels.fit(batch):
            yield [pixels.pixels(batch[0])], kept
        else:
            yield [x.cpu().numpy() for x in batch], kept


def _outputs(path: str, model: ir.Model, opened: Opened, feeds: list[Feed], progress: Show) -> Mapping[str, Array]:
    """Return every output of the file, image by image."""
    names, images = [str(value.name) for value in model.graph.outputs], Images(path, OPERATION)
    done = 0
    for arrays, kept in feeds:
        images.add(dict(zip(names, opened.run(arrays), strict=True)), len(arrays[0]), kept)
        done += kept
        progress(UnderWay(f"verify: {opened.name}", done, sum(count for _, count in feeds)))
    return images.outputs()


def _codes(path: Path, opening: _Opening, plain: Opened, feeds: list[Feed], images: int, size: int) -> Layers:
    """Compare the codes of every activation of the first images, `size` images at a time."""
    theirs, mine = load_file(path), exact_here(load_file(path))
    sites = [_activations(model, str(path)) for model in (mine, theirs)]
    common = [site for site in sites[1] if site in sites[0]]
    own = len(theirs.graph.outputs)
    for model, found in zip((mine, theirs), sites, strict=True):
        add_outputs(model, tuple(dict.fromkeys(found[site].tensor for site in common)))
    counts: dict[str, CodeCount] = {}
    disturbed = False
    with scratch(OPERATION, sum(tensor.nbytes for tensor in tensors_of(theirs))) as folder, ExitStack() as stack:
        save_with_data(theirs, folder / "codes.onnx")
        told = stack.enter_context(opening.of_file(folder / "codes.onnx", theirs))
        reference = opening.reference(mine)
        for arrays in _first(feeds, images, size):
            results = told.run(arrays)
            logits = zip(results[:own], plain.run(arrays), strict=True)
            disturbed |= any(not np.array_equal(a, b, equal_nan=True) for a, b in logits)
            sides = [_by_tensor(m, r) for m, r in ((mine, reference.run(arrays)), (theirs, results))]
            for site in common:
                codes = [integers(side[s[site].tensor], s[site]) for side, s in zip(sides, sites, strict=True)]
                now = count_codes(codes[0], codes[1], len(arrays[0]), same_scale=True)
                counts[site] = add_counts(counts.get(site), now)
    missing = tuple(site for site in sites[1] if site not in common)
    return Layers(tuple(comparison_of(site, count) for site, count in counts.items()), missing, disturbed)


def _activations(model: ir.Model, path: str) -> dict[str, StoredSite]:
    return {name: site for name, site in stored_sites(model, OPERATION, path).items() if site.codes is None}


def _by_tensor(model: ir.Model, results: list[Array]) -> dict[str, Array]:
    return dict(zip((str(value.name) for value in model.graph.outputs), results, strict=True))


def _first(feeds: list[Feed], images: int, size: int) -> Iterator[list[Array]]:
    """Yield the first images, `size` at a time; of a filled-up batch only as much as holds images that count."""
    for arrays, kept in feeds:
        for start in range(0, min(kept, images), size):
            yield [x[start : start + size] for x in arrays]
        images -= kept
