"""The copy of a model that tracing works on: unwrapped, float32, in evaluation mode, and nobody else's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from ptq4vit_fx.errors import failure
from ptq4vit_fx.passes.graph.float_model import unwrapped
from ptq4vit_fx.passes.graph.rebinding import rebind


def float_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose floating-point tensors are float32 and whose weights are plain parameters.

    What belongs to training stays behind: compiled code, backward hooks, gradients, and the weight norms and masks that
    compute a weight from others, which here become that weight. Raises PTQError if the model cannot be copied.
    """
    duplicate = _deep_copy(model, {})
    for module in list(duplicate.modules()):
        for name, child in module.named_children():
            module._modules[name] = unwrapped(child) if hasattr(child, "_orig_mod") else child
    for module in duplicate.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        _compute_weights(module)
    duplicate.eval()
    duplicate.requires_grad_(False)
    for tensor in [*duplicate.parameters(), *duplicate.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return duplicate


def is_float32(model: nn.Module) -> bool:
    """Return whether every floating-point weight of a model is float32."""
    weights = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    return all(tensor.dtype is torch.float32 for tensor in weights)


def another_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a `float_copy` that shares its parameters: nothing else of one tracer is seen by the next."""
    return _deep_copy(model, {id(parameter): parameter for parameter in model.parameters()})


def _deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    with _PlainTensors():
        try:
            duplicate = copy.deepcopy(model, memo)
        except Exception as error:
            raise failure(
                "prepare_fx",
                f"{_what_cannot_be_copied(model)}of {type(model).__name__}",
                expected="a model that copy.deepcopy copies",
                got=f"{type(error).__name__}: {error}".splitlines()[0],
                do="take that attribute out of the model, or give its class a __deepcopy__",
            ) from error
    rebind(duplicate, memo)
    return duplicate


class _PlainTensors(TorchFunctionMode):
    """Lets deepcopy copy results too (the last attention map, a computed weight), without what computed them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or (args[0].is_leaf and not args[0].is_inference()):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]


def _what_cannot_be_copied(model: nn.Module) -> str:
    """Return `attribute 'x' of module 'y' ` of the first attribute that cannot be copied alone, "" if each can."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value, {id(child): child for child in model.modules()})
            except Exception:  # noqa: BLE001 - whatever it is, its owner is looked for
                return f"attribute {name!r} of module {path or '(root)'!r} "
    return ""


def _compute_weights(module: nn.Module) -> None:
    """Replace what computes weights in front of every forward (parametrizations, norms, pruning) by the weights."""
    if parametrize.is_parametrized(module):
        shared = type(module)  # with the original, whose property `weight` would be deleted too
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
