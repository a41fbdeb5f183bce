"""The float model in what a user passes as one, or the sentence that says why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm.utils
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from ptq4vit_fx.errors import PTQError, failure
from ptq4vit_fx.passes.graph.contract import stage_of

#: Modules around a model that train it or average it.
WRAPPERS = (
    *(nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel),
    *(timm.utils.ModelEma, timm.utils.ModelEmaV2, timm.utils.ModelEmaV3),
)
#: Packages whose modules hold weights that are integers already.
QUANTIZED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.nn.quantized",
    "bitsandbytes",
    "torchao",
)
#: Modules of torch.ao that prepare a model for quantization, where they stand in it or around its weights.
OBSERVING = ("torch.ao.quantization.fake_quantize", "torch.ao.quantization.observer", "torch.ao.nn.qat")


def float_model(model: Any) -> nn.Module:
    """Return the model in what was passed: unwrapped, its weights real numbers.

    Raises PTQError on what is no model (a class, a path, a state dict), on one that is scripted or quantized already,
    and on weights that are not there, not finite or not dense.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise _no_model(model)
    stage = stage_of(model) if isinstance(model, torch.fx.GraphModule) else None
    if stage is not None:
        got, do = f"a model at stage {stage.value!r}", "pass the float model that it was made of"
        raise _refusal(type(model).__name__, got, do)
    for path, module in model.named_modules():
        _check_module(path, module)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _check_tensor(name, tensor)
    return model


def unwrapped(model: Any) -> Any:
    """Return the model inside of what compiles, parallelizes or averages it; anything else as it is."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile(model)
            model = model._orig_mod
        elif isinstance(model, WRAPPERS):
            model = model.ema if isinstance(model, timm.utils.ModelEma) else model.module
        else:
            return model


def _refusal(subject: str, got: str, do: str) -> PTQError:
    return failure("prepare_fx", subject, expected="a float model, an instance of nn.Module", got=got, do=do)


def _no_model(model: Any) -> PTQError:
    got = f"{type(model).__name__}"
    if isinstance(model, type):
        got, do = f"the class {model.__name__}", f"create it: {model.__name__}(...)"
    elif isinstance(model, (str, Path)):
        got, do = f"the path {str(model)!r}", "create the model and load its weights with load_state_dict"
    elif isinstance(model, Mapping):
        do = "create the model, call model.load_state_dict(...) with this, and pass the model"
    elif isinstance(getattr(model, "model", None), nn.Module):  # a pipeline, a trainer
        do = "pass its model: .model"
    elif isinstance(getattr(model, "graph_module", None), nn.Module):  # an ExportedProgram
        do = "pass the module that was exported"
    elif callable(model):
        do = "make it the forward of an nn.Module that holds the models that it calls"
    else:
        do = "pass the PyTorch module that it was made of"
    return _refusal("model", got, do)


def _check_module(path: str, module: nn.Module) -> None:
    where = f"module {path or '(root)'!r}"
    if isinstance(module, torch.jit.ScriptModule):
        got = f"a {type(module).__name__}, which torch.jit compiled"
        raise _refusal(where, got, "pass the module that torch.jit was given")
    if type(module).__module__.startswith(QUANTIZED):
        got = f"{type(module).__module__}.{type(module).__name__}, which is quantized already"
        raise _refusal(where, got, "pass the model before its quantization")
    if any(kind.__module__.startswith(OBSERVING) for kind in type(module).__mro__):
        got = f"a {type(module).__name__}: the model is prepared for quantization"
        raise _refusal(where, got, "pass the model as it was before prepare_qat, prepare or prepare_fx")


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    got, do = "", "pass the model with plain tensors as weights"
    if is_lazy(tensor):
        got, do = "a lazy weight without a shape", "run the model once on images, which creates its weights"
    elif tensor.is_meta:
        got, do = (
            "a weight on the meta device, without values",
            "load the weights: to_empty(device=) and load_state_dict",
        )
    elif tensor.is_complex():
        got, do = f"a complex weight ({tensor.dtype})", "hold its real and imaginary part as two real weights"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        got = f"a weight of layout {tensor.layout}"
    elif tensor.is_quantized or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        got = f"a weight of type {type(tensor).__name__} ({tensor.dtype})"
    elif isinstance(tensor, nn.Parameter) and not torch.isfinite(tensor.detach()).all():
        got, do = "NaN or infinity", "load a checkpoint that trained to the end"
        raise failure("prepare_fx", f"parameter {name}", expected="finite values", got=got, do=do)
    if got:
        raise _refusal(f"weight {name}", got, do)
