"""The state of a model: hooks, replaced forwards, computed weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from brought import brought
from brought.pipeline import pictures, pipeline, sum_of_squares, vit
from ptq4vit_fx.passes.graph.contract import plan_of


@brought("state", "a plain model of timm", quick=True)
def plain() -> None:
    pipeline(vit(), pictures())


@brought("state", "a layer with a forward hook", quick=True)
def hooked_layer() -> None:
    model = vit()
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: output * 3)
    plan = plan_of(pipeline(model, pictures()))
    assert [op.name for op in plan.ops if "0.attn.qkv" in op.name] == ["blocks.0.attn.qkv"]


@brought("state", "a pre-hook on the model that normalizes its images", quick=True)
def normalizing_pre_hook() -> None:
    model = vit()
    model.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 0.3) * 4,))
    pipeline(model, pictures())


@brought("state", "a forward hook on the model that scales its logits")
def hooked_root() -> None:
    model = vit()
    model.register_forward_hook(lambda module, inputs, output: output * 0.5 - 1)
    pipeline(model, pictures())


@brought("state", "hooks with keyword arguments, on a block and on its attention")
def hooks_with_keywords() -> None:
    model = vit()

    def shifted(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (args[0] + 0.5, *args[1:]), kwargs

    model.blocks[0].register_forward_pre_hook(shifted, with_kwargs=True)
    model.blocks[1].attn.register_forward_hook(lambda m, args, kwargs, output: output * 2, with_kwargs=True)
    pipeline(model, pictures())


@brought("state", "a pre-hook on a LayerNorm, a hook on a convolution and on a GELU")
def hooked_leaves() -> None:
    model = vit()
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model.patch_embed.proj.register_forward_hook(lambda module, inputs, output: output.clamp(-1, 1))
    model.blocks[1].mlp.act.register_forward_hook(lambda module, inputs, output: output + 0.25)
    pipeline(model, pictures())


@brought("state", "a hook on every module of the process")
def global_hook() -> None:
    def scaled(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output * 1.5 if isinstance(module, nn.Linear) else None

    handle = torch.nn.modules.module.register_module_forward_hook(scaled)
    try:
        pipeline(vit(), pictures())
    finally:
        handle.remove()


@brought("state", "hooks that collect features")
def collecting_hooks() -> None:
    model, seen = vit(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pipeline(model, pictures())
    assert all(isinstance(x, Tensor) and x.shape == (6, 17, 48) for x in seen), "what the tracer saw leaked"


@brought("state", "a hook that reads what another hook kept")
def skip_connection_by_hooks() -> None:
    model, kept = vit(), {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept["x"] = output

    model.patch_embed.register_forward_hook(keep)
    model.blocks[1].register_forward_hook(lambda m, i, o: o + kept["x"].mean(1, keepdim=True))
    pipeline(model, pictures())


@brought("state", "backward hooks, as Grad-CAM leaves them")
def backward_hooks() -> None:
    model = vit()
    model.blocks[1].register_full_backward_hook(lambda module, before, behind: None)
    model.head.register_full_backward_pre_hook(lambda module, before: None)
    pipeline(model, pictures())


@brought("state", "model.forward = model.forward_features", quick=True)
def replaced_forward() -> None:
    model = vit()
    model.forward = model.forward_features
    assert model(pictures()).shape == (6, 17, 48)
    pipeline(model, pictures(), loss=sum_of_squares)


@brought("state", "a forward replaced by a function that calls the model")
def closed_over_forward() -> None:
    model = vit()
    model.forward = lambda x: model.head(model.forward_features(x)[:, 1:].mean(1))
    pipeline(model, pictures())


@brought("state", "a forward replaced by functools.partial")
def partial_forward() -> None:
    model = vit()
    model.forward = functools.partial(model.forward_intermediates, indices=[1], norm=True, intermediates_only=True)
    pipeline(model, pictures(), loss=sum_of_squares)


@brought("state", "a layer whose forward was replaced, as adapters do")
def replaced_layer_forward() -> None:
    model = vit()
    layer, down, up = model.blocks[0].attn.qkv, torch.randn(48, 4) / 7, torch.randn(4, 144) / 2
    original = layer.forward
    layer.forward = lambda x: original(x) + x @ down @ up
    pipeline(model, pictures())


@brought("state", "a method borrowed from another instance")
def foreign_method() -> None:
    model, other = vit(), vit(num_classes=0)
    model.blocks[0].mlp.forward = other.blocks[1].mlp.forward
    model.other = other
    pipeline(model, pictures())


@brought("state", "a class with its own __call__")
def own_call() -> None:
    class Scaled(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    model = vit()
    model.blocks[0].mlp.fc2 = Scaled(192, 48)
    pipeline(model, pictures())


@brought("state", "old weight_norm, after a forward", quick=True)
def old_weight_norm() -> None:
    model = vit()
    torch.nn.utils.weight_norm(model.head)
    model(pictures())
    assert "head" in {op.name for op in plan_of(pipeline(model, pictures())).ops}


@brought("state", "old spectral_norm, and masks of pruning")
def old_spectral_norm_and_pruning() -> None:
    model = vit()
    torch.nn.utils.spectral_norm(model.blocks[0].mlp.fc1)
    prune.l1_unstructured(model.blocks[1].mlp.fc1, "weight", amount=0.5)
    model.train()(pictures())
    pipeline(model.eval(), pictures())


@brought("state", "parametrized weights: weight_norm, spectral_norm, orthogonal and one's own")
def parametrized_weights() -> None:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).transpose(-1, -2)

    model = vit()
    parametrizations.weight_norm(model.blocks[0].attn.qkv)
    parametrizations.spectral_norm(model.blocks[0].mlp.fc1)
    parametrizations.orthogonal(model.blocks[0].mlp.fc2)
    parametrize.register_parametrization(model.blocks[1].attn.proj, "weight", Symmetric())
    assert len(plan_of(pipeline(model.eval(), pictures())).ops) == 14
    assert parametrize.is_parametrized(model.blocks[1].attn.proj), "the user's model was changed"


@brought("state", "a model that keeps its last attention map")
def kept_results() -> None:
    model = vit()
    model.last_output = model(pictures())
    pipeline(model, pictures())


@brought("state", "a model in training mode, with batch norms and dropout")
def training_mode() -> None:
    model = nn.Sequential(vit(num_classes=0, drop_rate=0.3, drop_path_rate=0.2), nn.BatchNorm1d(48), nn.Linear(48, 7))
    model(pictures())
    model.train()
    pipeline(model, pictures(), reference=lambda x: _in_evaluation(model, x))
    assert model.training, "the user's model was changed"


def _in_evaluation(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    output: Tensor = model(x)
    model.train()
    return output
