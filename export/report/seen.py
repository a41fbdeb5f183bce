"""What comes to each site of a file, and the grid over it: histograms, noise, how much is cut off, codes in use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ptq4vit_fx import names
from ptq4vit_fx.export import nodes
from ptq4vit_fx.export.nodes import Array
from ptq4vit_fx.export.proof.outputs import filled, fixed_batch, run
from ptq4vit_fx.export.proof.runtime import exact_here, exact_options, open_model
from ptq4vit_fx.export.stored_sites import StoredSite, integers
from ptq4vit_fx.inputs.records import Place
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.names import Site
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.quantizers import QParams, Quantizer, TwinParams, TwinUniform, Uniform, UniformParams, Unquantized

BINS = 96
#: Values of a site that are kept of each run for its histogram, evenly spread; ends, noise and codes are of all.
KEPT = 2**15
#: Operators that a lowering puts between a value and its quantizer (passes/lower_activations.py).
IN_FRONT = frozenset(["Clip", "Sub", *nodes.MOVES])


@dataclass(frozen=True)
class View:
    """A histogram: counts of BINS equal bins from low to high."""

    low: float
    high: float
    counts: Array


@dataclass(frozen=True)
class Seen:
    """What came to one site: histograms, the whole and, of a twin, where its ranges meet; the grid, ascending.

    threshold: where the fine range ends, None if there is one range. codes: how many there are; used: how many
    occurred. clipped: share of the values that lie beyond the grid. snr: in dB on these values, None of a weight, of
    which the file has the codes alone: its unit is then the step of its own channel.
    """

    views: tuple[View, ...]
    levels: Array
    threshold: float | None
    codes: int
    used: int
    clipped: float
    snr: float | None


def weights_seen(stored: dict[str, StoredSite], plan: QuantPlan) -> dict[Site, Seen]:
    """Return site -> its codes, of every site that the file holds as a constant."""
    found = {}
    for site, quantizer in plan.quantizers.items():
        one = stored.get(site)
        if one is None or one.codes is None or not isinstance(quantizer, Uniform):
            continue
        codes = integers(one.codes, one)
        first = -(2 ** (quantizer.bits - 1)) if quantizer.signed else 0
        last = first + quantizer.top
        counts = np.bincount((codes.ravel() - first).clip(0, quantizer.top), minlength=quantizer.top + 1)
        views = (View(first - 0.5, last + 0.5, counts),)
        used = int(np.count_nonzero(counts))
        found[site] = Seen(views, np.arange(first, last + 1.0), None, len(counts), used, 0.0, None)
    return found


def activations_seen(
    model: ir.Model, stored: dict[str, StoredSite], plan: QuantPlan, path: str, batches: Iterable[Inputs]
) -> dict[Site, Seen]:
    """Run a file on images and return site -> what came to its quantizer, of every site that is no constant.

    stored: of this model. Values are those of the file, with all that the quantizers in front of them lose.
    """
    model = exact_here(model.clone())
    watched = {site: one for site in plan.grids if (one := _watched(site, model, stored, plan, path)) is not None}
    made = {nodes.name_of(value): value for node in model.graph for value in node.outputs}
    read = [name for name in dict.fromkeys(one.value for one in watched.values()) if name in made]
    own = len(model.graph.outputs)
    model.graph.outputs.extend(made[name] for name in read if made[name] not in model.graph.outputs)
    added = [nodes.name_of(value) for value in model.graph.outputs]
    session = open_model(model, options=exact_options())
    fixed = fixed_batch("report", path, session)
    for batch in batches:
        for start in range(0, len(batch[0]), fixed or 1):
            part = filled(tuple(x[start : start + (fixed or 1)] for x in batch), fixed or 1)
            feed = [x.cpu().numpy() for x in part]
            results = run("report", path, session, feed)
            values = dict(zip((nodes.name_of(value) for value in model.graph.inputs), feed, strict=True))
            values |= dict(zip(added[own:], results[own:], strict=True)) | dict(zip(added, results, strict=True))
            for one in watched.values():
                one.add(values[one.value])
    return {site: one.seen() for site, one in watched.items() if one.total}


@dataclass
class _Watched:
    """A site while images run: the tensor in front of its quantizer, and what has come to it so far."""

    value: str
    quantizer: Quantizer
    params: QParams
    levels: Tensor
    kept: list[Array] = field(default_factory=list)
    low: float = float("inf")
    high: float = -float("inf")
    total: int = 0
    clipped: int = 0
    signal: float = 0.0
    noise: float = 0.0
    used: set[int] = field(default_factory=set)

    def add(self, values: Array) -> None:
        # A file that overflows gives infinities and NaN, which have no code.
        x = torch.from_numpy(np.nan_to_num(np.asarray(values, np.float32))).flatten()
        if not x.numel():
            return
        codes = self.quantizer.codes(x, self.params)
        first = int(codes.min())
        self.used.update((torch.bincount(codes - first).nonzero().flatten() + first).tolist())
        error = (self.quantizer.decode(codes, self.params) - x).double()
        self.noise += float(error.square_().sum())
        self.signal += float(x.double().square_().sum())
        (below, above), ends = (self.levels[:2].tolist(), self.levels[-2:].tolist())
        bottom, top = below - (above - below) / 2, ends[1] + (ends[1] - ends[0]) / 2
        self.clipped += int(((x < bottom) | (x > top)).sum())
        low, high = (float(end) for end in torch.aminmax(x))
        self.low, self.high, self.total = min(self.low, low), max(self.high, high), self.total + x.numel()
        self.kept.append(x[:: -(-x.numel() // KEPT) | 1].numpy())  # an odd step meets every column of a matrix

    def seen(self) -> Seen:
        values, threshold = np.concatenate(self.kept), self.quantizer.threshold(self.params)
        if len(values) < self.total:  # the farthest values stand in the histogram whether they were kept or not
            values = np.append(values, (self.low, self.high))
        ratio = 10 * np.log10(self.signal / self.noise) if self.noise and self.signal else float("inf")
        ends = [(self.low, self.high)]
        if isinstance(self.quantizer, TwinUniform) and threshold is not None:
            reach = 2 * float(threshold) or 1.5 * float(self.quantizer.minimum)
            close = (max(self.low, -reach), min(self.high, reach))
            ends += [close] * (close[1] - close[0] < 0.6 * (self.high - self.low))
        return Seen(
            tuple(_view(values, low, high) for low, high in ends),
            self.levels.numpy(),
            None if threshold is None else float(threshold),
            len(self.levels),
            len(self.used),
            self.clipped / self.total,
            float(ratio),
        )


def _view(values: Array, low: float, high: float) -> View:
    if not low < high:
        low, high = low - 0.5, high + 0.5
    return View(low, high, np.histogram(values, BINS, (low, high))[0])


def _watched(site: Site, model: ir.Model, stored: dict[str, StoredSite], plan: QuantPlan, path: str) -> _Watched | None:
    """Return what to watch for a site; None of a constant, and where another program left no scales to read.

    Raises PTQError on scales that no quantizer of this package has.
    """
    quantizer = plan.quantizers[site]
    parts = names.RANGES if isinstance(quantizer, TwinUniform) else (None,)
    found = [stored.get(names.branch(site, part)) for part in parts]
    if any(one is None or one.codes is not None or one.scale.ndim for one in found):
        return None
    scales = [torch.from_numpy(np.array(one.scale)) for one in found if one is not None]
    params = TwinParams(scales[0], scales[1]) if isinstance(quantizer, TwinUniform) else UniformParams(scales[0])
    quantizer.check(params, Place("report", path).at(site))
    tensor = found[-1].tensor if found[-1] is not None else ""
    quantize = next((node for node in model.graph if nodes.name_of(node.outputs[0]) == tensor), None)
    if quantize is None:
        return None
    return _Watched(_in_front(quantize, site), quantizer, params, levels(quantizer, params))


def _in_front(quantize: ir.Node, site: Site) -> str:
    """Return the name of the value that a site is given: what clips and splits it belongs to the quantizer."""
    owners = {names.product_of(site), names.product_of(nodes.scope_of(quantize)), site}
    value = nodes.input_of(quantize, 0)
    while (node := value.producer()) is not None and node.op_type in IN_FRONT and nodes.scope_of(node) in owners:
        if not all(other is None or nodes.is_constant(other) for other in node.inputs[1:]):
            break
        value = nodes.input_of(node, 0)
    return nodes.name_of(value)


def levels(quantizer: Quantizer, params: QParams) -> Tensor:
    """Return the values that a quantizer gives, ascending, float32; params: of one scale, or of a twin."""
    assert not isinstance(quantizer, Unquantized)
    if isinstance(quantizer, TwinUniform):
        codes = torch.arange(2 * quantizer.levels, dtype=torch.int32)
    else:
        below = int(quantizer.zero_point(params.tensors()["scale"]))
        codes = torch.arange(-below, quantizer.top + 1 - below, dtype=torch.int32)
    values = quantizer.decode(codes, params)
    if isinstance(quantizer, TwinUniform) and quantizer.form == "softmax":
        values = values.clamp(max=1.0)  # its codes reach farther than what it codes
    given: Tensor = torch.unique(quantizer.fake_quantize(values, params))
    return given
