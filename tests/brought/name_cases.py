"""Names that submodules and parameters have: private ones, and those that a graph or Python uses itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import FILE_COSINE, QUICK, cosine, pictures, pipeline, run_file, vit
from ptq4vit_fx.export.targets import TARGETS


class Named(nn.Module):
    """A transformer and a head, each under a name of the case's choice."""

    def __init__(self, net: str, head: str) -> None:
        super().__init__()
        self.names = (net, head)
        torch.manual_seed(0)
        self.add_module(net, vit(num_classes=0))
        self.add_module(head, nn.Linear(48, 7))

    def forward(self, x: Tensor) -> Tensor:
        net, head = (self.get_submodule(name) for name in self.names)
        return head(net(x))  # type: ignore[no-any-return]


class Written(nn.Module):
    """Modules and parameters under names, and a forward that is a function of itself and the images."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.register_parameter(name, part) if isinstance(part, nn.Parameter) else self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@brought("model", "a submodule whose name begins with an underscore: self._net, self._head", quick=True)
def private_names() -> None:
    pipeline(Named("_net", "_head").eval(), pictures())


@brought("model", "a convolution self._stem in front of the transformer, a parameter self._scale")
def private_stem() -> None:
    parts = {"net": vit(), "_stem": nn.Conv2d(3, 3, 3, padding=1), "_scale": nn.Parameter(torch.tensor(2.0))}
    pipeline(Written(lambda self, x: self.net(self._stem(x)) * self._scale, **parts).eval(), pictures())


@brought("model", "private names, in a file for every target")
def private_names_for_every_target() -> None:
    images, model = pictures(), Named("_", "_empty").eval()
    recipe = ptq.recipes.tensorrt().with_search(n=10, rounds=1)
    for target in TARGETS:
        chosen = recipe if target == "tensorrt" else QUICK
        converted = ptq.quantize(model, images, qconfig_mapping=chosen, progress=False)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "model.onnx"
            ptq.export_onnx(converted, path, images[:1], target=target)
            assert cosine(run_file(path, (images,), None), converted(images)) > FILE_COSINE, target


@brought("model", "names that this package writes itself: submodules `lhs` and `codes_head`")
def own_words() -> None:
    pipeline(Named("lhs", "codes_head").eval(), pictures())
