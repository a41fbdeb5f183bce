"""Layer by layer: the integer codes of every site, in ONNX Runtime beside the simulation in PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.export.model_files import load_file, unreadable
from ptq4vit_fx.export.nodes import Array
from ptq4vit_fx.export.proof.outputs import filled, fixed_batch, run
from ptq4vit_fx.export.proof.runtime import exact_here, exact_options, open_model
from ptq4vit_fx.export.proof.runtime_functions import RuntimeFunctions
from ptq4vit_fx.export.proof.site_codes import CodeCount, Layers, add_counts, comparison_of, count_codes
from ptq4vit_fx.export.stored_sites import StoredSite, integers, stored_sites
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.names import leaf_of, owner_of
from ptq4vit_fx.passes.graph.dataflow import stored_path
from ptq4vit_fx.passes.graph.marks import scope_of
from ptq4vit_fx.passes.graph.operators import QUANTIZE
from ptq4vit_fx.passes.graph.rewriter import SiteTensors

#: Codes of ONNX Runtime that are held at once, in bytes; one image is always held whole.
CODES_AT_ONCE = 256 * 2**20


def compare_layers(
    converted: GraphModule,
    path: str | os.PathLike[str],
    plain: onnxruntime.InferenceSession,
    batches: Iterable[Inputs],
    images: int,
) -> Layers:
    """Run the first `images` images in both; compare the codes of every quantizer, and those of every weight once.

    PyTorch takes LayerNorm, softmax and GELU from the runtime. Its codes are compared as they appear, so that only ONNX
    Runtime's are held. The first image runs alone and tells how much memory one takes, the others in their batches: a
    file with a dynamic batch must do both. A file of a fixed batch runs whole batches, the last one filled up. plain:
    `open_session(path)`.
    """
    with unreadable("verify_onnx", path, "the sites of this model"):
        return _compare(converted, str(path), plain, batches, images)


def _compare(
    converted: GraphModule, path: str, plain: onnxruntime.InferenceSession, batches: Iterable[Inputs], images: int
) -> Layers:
    model = exact_here(load_file(path))
    stored = stored_sites(model, "verify_onnx", path)
    read = tuple({site.tensor for site in stored.values() if site.codes is None})
    add_outputs(model, read)
    session = open_model(model, options=exact_options())
    simulation = _Simulation(copy.deepcopy(converted).cpu(), stored)
    fixed = fixed_batch("verify_onnx", path, session)
    at_once = fixed or 1
    waiting, disturbed = _first_images(batches, images, cut=at_once != fixed), False
    while waiting:
        whole = waiting.pop(0)
        batch = tuple(x[:at_once] for x in whole)
        if len(whole[0]) > at_once:
            waiting.insert(0, tuple(x[at_once:] for x in whole))
        batch = filled(batch, at_once if at_once == fixed else 0)
        fed = [x.cpu().numpy() for x in batch]
        logits = run("verify_onnx", path, plain, fed)
        outputs = run("verify_onnx", path, session, fed)
        disturbed |= any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(logits, outputs, strict=False))
        if at_once != fixed:
            at_once = max(1, CODES_AT_ONCE * len(batch[0]) // max(1, sum(array.nbytes for array in outputs)))
        simulation.codes = dict(zip(read, outputs[len(logits) :], strict=True))
        simulation.images = len(batch[0])
        with torch.inference_mode():
            simulation.run(*(x.cpu() for x in batch))
    sites = tuple(comparison_of(site, count) for site, count in simulation.counts.items())
    return Layers(sites, tuple(simulation.missing), disturbed)


def _first_images(batches: Iterable[Inputs], count: int, *, cut: bool) -> list[Inputs]:
    """Return the first `count` images in their batches, or with cut=False the whole batches that they are in."""
    first = []
    for batch in batches:
        if count <= 0:
            break
        first.append(tuple(x[:count] for x in batch) if cut else batch)
        count -= len(batch[0])
    return first


def add_outputs(model: ir.Model, tensors: tuple[str, ...]) -> None:
    """Add these tensors to the outputs of a model, in place, behind its own.

    ONNX Runtime fuses the DequantizeLinear behind a code into the product, never the QuantizeLinear in front of it, so
    that a code that is read changes no fusion.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in tensors)


def _same(mine: Array, theirs: Array) -> bool:
    """Return whether two scales are the same, one for all channels or one for each."""
    return (mine.shape == theirs.shape or 1 in (mine.size, theirs.size)) and bool((mine == theirs).all())


class _Simulation(RuntimeFunctions):
    """Runs the converted model and compares each site's codes, when it comes to them, with `codes` of the runtime.

    Set `codes` (tensor name -> integers) and `images` before each run; read `counts` and `missing` afterwards.
    """

    def __init__(self, converted: GraphModule, stored: dict[str, StoredSite]) -> None:
        super().__init__(converted)
        self.converted, self.stored = converted, stored
        self.codes: dict[str, Array] = {}
        self.images = 0
        self.counts: dict[str, CodeCount] = {}
        self.missing: dict[str, None] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        holder = n.args[1] if n.target is QUANTIZE else n if leaf_of(stored_path(n)) == "codes" else None
        tensors = None if holder is None else self.converted.get_submodule(owner_of(stored_path(holder)))
        if isinstance(tensors, SiteTensors):  # a model may have a buffer of its own that is called codes
            self._compare(scope_of(n), result, tensors)
        return result

    def _compare(self, site: str, codes: Tensor, tensors: SiteTensors) -> None:
        stored = self.stored.get(site)
        if stored is None:
            self.missing[site] = None
            return
        if stored.codes is not None and site in self.counts:
            return  # a weight is compared once
        theirs = integers(self.codes[stored.tensor] if stored.codes is None else stored.codes, stored)
        mine = integers(codes.numpy(), replace(stored, zero_point=tensors.zero_point.numpy()))
        same_scale = _same(tensors.scale.numpy(), stored.scale)
        images = self.images if stored.codes is None else 0
        self.counts[site] = add_counts(self.counts.get(site), count_codes(mine, theirs, images, same_scale))
