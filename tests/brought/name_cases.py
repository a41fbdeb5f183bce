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
from ptq4vit_fx.passes.graph.contract import plan_of


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


@brought("model", "submodules called `plan` and `graph`, which a GraphModule has itself", quick=True)
def names_of_a_graph_module() -> None:
    pipeline(Named("plan", "graph").eval(), pictures())
    pipeline(Named("calibration", "meta").eval(), pictures())


@brought("model", "a parameter called `code`, a buffer called `meta`")
def parameter_names_of_a_graph_module() -> None:
    model = Written(lambda self, x: self.net(x * self.code + self.meta), net=vit(), code=nn.Parameter(torch.ones(1)))
    model.register_buffer("meta", torch.ones(1))
    pipeline(model.eval(), pictures())


class Heads(nn.Module):
    """A transformer with a head of every name, their logits summed."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.heads = vit(num_classes=0), nn.ModuleDict({name: nn.Linear(48, 7) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        features = self.net(x)
        return torch.stack([head(features) * number for number, head in enumerate(self.heads.values(), 1)]).sum(0)


@brought("model", "ModuleDict with the keys class, class_ and None", quick=True)
def names_of_python() -> None:
    plan = plan_of(pipeline(Heads("class", "class_", "None").eval(), pictures()))
    assert [op.name for op in plan.ops if "heads" in op.name] == ["heads.class__", "heads.class_", "heads.None_"]


@brought("model", "modules called `def` and `in`, a parameter called `lambda`, and a forward with len(x)")
def names_of_python_by_export() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return getattr(getattr(self, "def"), "in")(x) * getattr(self, "lambda").expand(len(x), 7)

    model = Written(forward, **{"def": nn.ModuleDict({"in": vit()}), "lambda": nn.Parameter(torch.ones(1) * 2)})
    pipeline(model.eval(), pictures())


@brought("model", "ModuleDict with the keys a:lhs, a/b and 'it \"is\" one'")
def names_of_sites() -> None:
    pipeline(Heads("a:lhs", "a/b", 'it "is" one').eval(), pictures())


@brought("model", "leaf_modules= of a module whose name is a word of Python")
def closed_name_of_python() -> None:
    converted = pipeline(Heads("class", "b").eval(), pictures(), leaf_modules=["heads.class"])
    assert [op.name for op in plan_of(converted).float_ops] == ["heads.class_"]
