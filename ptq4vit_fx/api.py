"""The API on one page: what a user calls, and what each call is made of. The passes are in `pipeline.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

from ptq4vit_fx.calibrating.calibrator import run_calibration
from ptq4vit_fx.calibrating.fit import check_fits, check_weights
from ptq4vit_fx.calibrating.group_tasks import check_work
from ptq4vit_fx.calibrating.losses import Loss
from ptq4vit_fx.calibrating.options import CalibrationOptions, chosen_loss
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.data.handed_in import Preparation, as_pixels
from ptq4vit_fx.data.preprocessing import PREPROCESSING, own_config
from ptq4vit_fx.errors import PTQError, failure
from ptq4vit_fx.inputs.batches import first_item, pictures_for
from ptq4vit_fx.inputs.containers import check_containers
from ptq4vit_fx.inputs.example import check_batch_dimension, example_of, first_example, without_labels
from ptq4vit_fx.inputs.plausible import NORMALIZATION, normalization_of
from ptq4vit_fx.inputs.progress import Show
from ptq4vit_fx.inputs.sizes import bytes_of
from ptq4vit_fx.inputs.tensors import Inputs
from ptq4vit_fx.passes.graph.behaviour import check_behaviour
from ptq4vit_fx.passes.graph.contract import attach, calibration_of, on_cpu
from ptq4vit_fx.passes.graph.float_model import float_model
from ptq4vit_fx.passes.graph.shapes import has_shapes, record_shapes
from ptq4vit_fx.passes.graph.staged_model import calibrated_alone, model_at
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.graph.traced_module import TracedModule
from ptq4vit_fx.passes.trace import module_paths, trace
from ptq4vit_fx.pipeline import CONVERSION, preparation
from ptq4vit_fx.qconfig import QConfigMapping
from ptq4vit_fx.recipes import best
from ptq4vit_fx.torch_state import independent_of_caller


@independent_of_caller()
def prepare_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping,
    example_inputs: Any,
    *,
    leaf_modules: Sequence[str | type[nn.Module]] = (),
    skip: str | Sequence[str] = (),
) -> TracedModule:
    """Trace a float model, make its graph canonical, plan its quantization and insert observers.

    model: any traceable vision transformer; it is copied, never changed, and the copy is in evaluation mode.
    example_inputs: an image batch (batch, channels, height, width), or any tensor or array that has the batch first; a
    tuple of as many as forward is given; or a mapping by the names of forward's parameters, such as a processor's
    output; labels are left out. leaf_modules: types or paths of modules that stay closed and float. skip: names
    of modules or products that stay float, or patterns such as `blocks.*.attn`. Returns a GraphModule that computes the
    float model and has `.plan` (a QuantPlan). Raises PTQError if the model cannot be traced or run on the example, if
    it holds NaN, or if a name or a rule of the mapping matches nothing; warns (PTQWarning) of every product that stays
    float though no rule says so.
    """
    model = float_model(model)
    closed = module_paths(model, leaf_modules)
    try:
        example = example_of(model, example_inputs)
    except PTQError:
        check_containers(model, example_inputs, "prepare_fx")
        raise
    try:
        traced = trace(model, example.tensors, closed, example.names)
    except PTQError:
        inputs_alone = without_labels(model, example)
        if inputs_alone is None:
            check_containers(model, example_inputs, "prepare_fx")
            check_batch_dimension(model, example)
            raise
        return prepare_fx(model, qconfig_mapping, inputs_alone.tensors, leaf_modules=leaf_modules, skip=skip)
    traced.meta[NORMALIZATION], traced.meta[PREPROCESSING] = normalization_of(model), own_config(model)
    return cast("TracedModule", prepare_traced(traced, qconfig_mapping.skipping(skip), example.tensors, closed))


def prepare_traced(
    graph_module: GraphModule, qconfig_mapping: QConfigMapping, inputs: Inputs, closed: Sequence[str] = ()
) -> GraphModule:
    """Do what `prepare_fx` does behind the tracer, in place; closed: paths of modules whose products stay float."""
    if not has_shapes(graph_module):
        record_shapes(graph_module, inputs)
    preparation(qconfig_mapping, closed).run(graph_module)
    check_behaviour(graph_module)
    return attach(graph_module, calibration=None)


@independent_of_caller()
def calibrate(
    prepared: GraphModule,
    data: Any,
    *,
    images: int | None = None,
    seed: int = 0,
    progress: bool | Show = True,
    device: torch.device | str | None = None,
    search_device: torch.device | str | None = None,
    loss: str | Loss | None = None,
    memory_limit: int | str | None = None,
    transform: Callable[[Any], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    sequential: bool = False,
    executor: Executor | None = None,
    groups: int | None = None,
) -> Calibration:
    """Choose every scale on a few unlabelled images; return the Calibration and set it on `prepared` too.

    data: a tensor or array (images, channels, height, width), or an iterable of such batches or of (batch, anything)
    pairs; labels are never used; for a model of n inputs, an iterable of tuples that start with n tensors; everywhere a
    mapping by the names of the inputs, of which the rest is ignored. Half and double become float32. Pictures are data
    too: the path of a folder (or of what else docs/data.md lists), a data set of images of pillow, a list of paths;
    they become pixels by `transform`, by default as a timm model's own configuration says, and 32 of them are read.
    transform: a function from a picture, or from what else an item of data has for the image, to pixels.
    images: so many are read at most; by default all of a tensor or list, the first 1,024 of any other iterable.
    seed: of the rows that screening samples and the labels that "fisher" draws; same seed, same scales, bit for bit.
    device: where the model runs (default: where it is; it is brought back afterwards).
    search_device: where candidates are evaluated (default: `device`): a model that does not fit on a GPU may stay on
    the CPU while its products are searched there, one at a time. loss: the recipe's by default: "pseudo_label"
    (PTQ4ViT), "fisher" (labels drawn from the prediction), "projection" (how far the output's direction moves, logits
    or not; that of `recipes.best`), or a function from the model's output to a scalar, to one number per image, which
    are summed, or to several of these. memory_limit: bytes, or text such as "8GiB", that calibration may take beside
    the model (default: half of what is free); a smaller limit costs more passes over the images.
    checkpoint: a file that holds every finished product; if it exists, the calibration goes on from there, with the
    result of an unbroken run. progress: draw a bar, in a terminal; or a function that is called with what is under way
    (`UnderWay`). sequential: search each product on the values that the quantized products before it give,
    at one forward and backward per product; the default, parallel calibration on float values, is the paper's and is
    better on few images. executor: any `concurrent.futures.Executor`, of processes or of other machines, whose workers
    get the model and the images as pickles and capture and search groups of products: the same scales, bit for bit,
    in whatever order, wherever the same torch computes with the same instructions (docs/distributed.md); device,
    search_device and memory_limit are then of each worker, and a worker that dies is tried elsewhere. groups: that the
    work is cut into (default 8); each costs a pass over the images, two to four per worker are good.
    Raises PTQError on a model that is not prepared or that another thread calibrates, on data without images or with
    NaN, on a checkpoint of another plan, other weights, images or arguments, on an executor that takes no tasks, whose
    workers have other packages, or with sequential. Warns (PTQWarning) of fewer than 16
    images, of equal ones, and of values that no normalized image has.
    """
    prepared = model_at(Stage.OBSERVED, prepared, "calibrate", "call prepare_fx first")
    devices, limit = (device, search_device), memory_limit
    limit = bytes_of(limit, "calibrate", "memory_limit") if isinstance(limit, str) else limit
    options = CalibrationOptions(
        images,
        seed,
        progress,
        *devices,
        chosen_loss(prepared, loss),
        limit,
        checkpoint,
        sequential,
        executor=executor,
        groups=groups,
    )
    check_work(options)
    data = data if transform is None else pictures_for(prepared, data, "calibrate", images=images, transform=transform)
    with calibrated_alone(prepared):
        calibration = run_calibration(prepared, data, options)
    check_fits(prepared, calibration, "calibrate")
    attach(prepared, calibration=calibration)
    return calibration


@independent_of_caller()
def load_calibration(prepared: GraphModule, calibration: Calibration) -> TracedModule:
    """Set the scales of a prepared model; return it.

    Raises PTQError if the calibration is of another plan or of other weights, lacks a site, or holds scales that no
    calibration gives: zero, negative, infinite, of another dtype, shape or axis than the operand has.
    """
    prepared = model_at(Stage.OBSERVED, prepared, "load_calibration", "call prepare_fx first")
    check_fits(prepared, calibration, "load_calibration")
    check_weights(prepared, calibration, "load_calibration")
    return attach(prepared, calibration=calibration)


@independent_of_caller()
def convert_fx(prepared: GraphModule) -> TracedModule:
    """Freeze the scales: integer weights, quantize and dequantize nodes, two branches behind every twin.

    Returns a new GraphModule that runs in PyTorch as the simulation of the deployed model; `prepared` is not
    changed. Raises PTQError if the model was not calibrated.
    """
    prepared = model_at(Stage.OBSERVED, prepared, "convert_fx", "call prepare_fx and calibrate first")
    calibration = calibration_of(prepared)
    if calibration is None:
        raise failure(
            "convert_fx",
            "prepared model",
            expected="scales",
            got="a model that was not calibrated",
            do="call calibrate(prepared, images) or load_calibration(prepared, calibration) first",
        )
    home = next((p.device for p in prepared.parameters()), torch.device("cpu"))
    return cast("TracedModule", attach(CONVERSION.run(on_cpu(prepared)).to(home), calibration=calibration))


@independent_of_caller()
def quantize(
    model: nn.Module,
    data: Any,
    *,
    qconfig_mapping: QConfigMapping | None = None,
    example_inputs: Any = None,
    leaf_modules: Sequence[str | type[nn.Module]] = (),
    skip: str | Sequence[str] = (),
    transform: Callable[[Any], Any] | None = None,
    **calibrate_kwargs: Any,
) -> TracedModule:
    """Prepare, calibrate and convert in one call; return the converted model.

    data, transform: as for `calibrate`; data may be the path of a folder of images. qconfig_mapping: default
    recipes.best(8, 8). example_inputs: default the first image of `data`; needed where forward is given more of an item
    than it must have. leaf_modules, skip: as for `prepare_fx`. The other arguments go to `calibrate`. The result has
    `.plan` and `.calibration`.
    """
    item = None
    if example_inputs is None:
        model = float_model(model)
        pictures = Preparation("quantize", transform, own_config(model))
        item, data = first_item(as_pixels(data, pictures, calibrate_kwargs.get("images")), "quantize")
        transform = None
    try:
        example = example_inputs if item is None else first_example(model, item, "quantize")
        prepared = prepare_fx(model, qconfig_mapping or best(), example, leaf_modules=leaf_modules, skip=skip)
    except PTQError:
        if item is not None:
            check_containers(model, item, "quantize", "the first item of data")
        raise
    calibrate(prepared, data, transform=transform, **calibrate_kwargs)
    return convert_fx(prepared)


__all__ = ["PTQError", "calibrate", "convert_fx", "load_calibration", "prepare_fx", "quantize"]
