"""What is refused for a reason of its own, which looks like another one: the sentence names the cause."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, vit


class Wrapped(nn.Module):
    """A ViT whose output is turned into another."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.net, self.output = vit(), output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.net(x))


@brought(
    "state", "a model behind prepare_qat", refused="the model is prepared for quantization; pass the model as it was"
)
def prepared_for_training() -> None:
    model = vit().train()
    model.head.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    ptq.prepare_fx(torch.ao.quantization.prepare_qat(model).eval(), QUICK, pictures(1))


@brought("tracing", "torchvision's plain CenterCrop in a Sequential", refused="those of v2 do without")
def plain_transforms() -> None:
    ptq.prepare_fx(
        nn.Sequential(transforms.CenterCrop(32), transforms.Normalize([0.5] * 3, [0.2] * 3), vit()),
        QUICK,
        pictures(1, 3, 40, 40),
    )


@brought("task", "a boolean output", refused="got a tensor (6, 7) of torch.bool; return the scores", quick=True)
def boolean_output() -> None:
    ptq.calibrate(ptq.prepare_fx(Wrapped(lambda y: y > 0).eval(), QUICK, pictures(1)), pictures(), progress=False)


@brought("task", "an output without a tensor", refused="got an output without one, dict")
def empty_output() -> None:
    ptq.prepare_fx(Wrapped(lambda y: {}).eval(), QUICK, pictures(1))


@brought("data", "batches of (paths, images, labels)", refused="got list of 3 texts; put the images first")
def paths_first() -> None:
    prepared = ptq.prepare_fx(vit(), QUICK, pictures(1))
    ptq.calibrate(prepared, [(["a.png", "b.png", "c.png"], pictures(3), torch.zeros(3))], progress=False)


@brought("input", "a forward that takes a mapping", refused="wrap the model in a module whose forward has a parameter")
def mapping_argument() -> None:
    class Model(Wrapped):
        def forward(self, batch: Any) -> Any:
            return self.net(batch["image"])

    ptq.prepare_fx(Model(None).eval(), QUICK, {"batch": {"image": pictures(1)}})


@brought("tracing", "300 modules around each other, with numbers as names", refused="nested at most about 200 deep")
def nested_numbers() -> None:
    model: nn.Module = vit()
    for _ in range(300):
        model = nn.Sequential(model)
    ptq.prepare_fx(model.eval(), QUICK, pictures(1))
