"""Forwards that take lists and mappings of tensors as one parameter: the sentence has the wrapper, and it works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, pipeline, vit


class Model(nn.Module):
    """A ViT on what a case finds in its arguments."""

    def __init__(self, find: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self.net, self.find = vit(), find

    def forward(self, batch: Any, more: Any = None) -> Tensor:
        views = self.find(batch) if more is None else self.find(batch, more)
        return torch.stack([self.net(view) * (number + 1) for number, view in enumerate(views)]).sum(0)


A, B = pictures(), pictures(seed=2)


def _wrapped(find: Callable[..., list[Tensor]], example: Any, *images: Tensor) -> None:
    """Check that a model is refused, and that the wrapper of the sentence works; raise the refusal."""
    model = Model(find).eval()
    try:
        ptq.prepare_fx(model, QUICK, example)
    except ptq.PTQError as error:
        refusal = error
    init, forward = re.findall("`(.*?)`", str(refusal))
    names: dict[str, Any] = {"nn": nn, "__name__": __name__}
    exec(f"class Wrapped(nn.Module):\n    {init}\n    {forward}", names)
    pipeline(names["Wrapped"](model).eval(), images)
    raise refusal


@brought("input", "a forward that takes a list of views", refused="self.model([batch_0, batch_1])`", quick=True)
def list_of_views() -> None:
    _wrapped(lambda views: views, [A[:1], B[:1]], A, B)


@brought("input", "a list of views inside of the tuple of inputs", refused="got list for 'batch'; wrap the model in a")
def list_inside_of_a_tuple() -> None:
    _wrapped(lambda views: views, ([A[:1], B[:1]],), A, B)


@brought("input", "a tuple of views by name", refused="def forward(self, batch_0, batch_1)")
def tuple_of_views() -> None:
    _wrapped(list, {"batch": (A[:1], B[:1])}, A, B)


@brought("input", "a forward that takes a mapping, given as it is", refused="self.model({'image': image})`", quick=True)
def mapping_of_one() -> None:
    _wrapped(lambda batch: [batch["image"]], {"image": A[:1]}, A)


@brought("input", "a forward that takes a mapping in a mapping", refused="({'a': {'image': image}, 'b': [b_0]})")
def nested_mapping() -> None:
    example = {"batch": {"a": {"image": A[:1]}, "b": [B[:1]]}}
    _wrapped(lambda batch: [batch["a"]["image"], batch["b"][0]], example, A, B)


@brought("input", "a list of mappings, with a number", refused="[{'image': image, 'scale': 2, 'image 2': x}]")
def list_of_mappings() -> None:
    example = [{"image": A[:1], "scale": 2, "image 2": B[:1]}]
    _wrapped(lambda items: [items[0]["image"] * items[0]["scale"], items[0]["image 2"]], example, A, B)


@brought("input", "an image and a list", refused="(batch, [more_0, more_1])`, and pass (batch, more_0, more_1)")
def image_and_list() -> None:
    _wrapped(lambda x, views: [x, *views], (A[:1], [B[:1], B[:1]]), A, B, A)


@brought("data", "quantize on lists of views", refused="quantize: the first item of data: expected a tensor")
def quantized_lists() -> None:
    ptq.quantize(Model(lambda views: views).eval(), [[A, B]], qconfig_mapping=QUICK, progress=False)


@brought("input", "a mapping, and a branch that cannot be traced: the branch is named", refused="if x.sum() > 0")
def untraceable_mapping() -> None:
    class Branching(nn.Module):
        def forward(self, *images: Any, image: Any = None) -> Any:
            x = images[0] if image is None else image
            if x.sum() > 0:
                x = x * 2
            return x.mean((2, 3))

    ptq.prepare_fx(Branching().eval(), QUICK, {"image": A[:1]})
