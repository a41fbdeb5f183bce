"""What is passed as a model: wrapped, compiled, half, in any mode of torch, random, or no model at all."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import timm.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, pipeline, vit
from ptq4vit_fx.passes.graph.contract import plan_of


def _prepare(model: Any) -> None:
    ptq.prepare_fx(model, QUICK, pictures(1))


def _compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


@brought("model", "torch.compile(model)", quick=True)
def compiled() -> None:
    plan = plan_of(pipeline(_compiled(vit()), pictures(), reference=vit()))
    assert plan.ops[0].name == "patch_embed.proj"


@brought("model", "a model with compiled blocks, and model.compile()")
def compiled_parts() -> None:
    model = vit()
    model.blocks[0] = _compiled(model.blocks[0])
    model.blocks[1].compile(backend="eager")
    assert plan_of(pipeline(model, pictures(), reference=vit())).ops[1].name == "blocks.0.attn.qkv"


@brought("model", "a compiled forward: model.forward = torch.compile(model.forward)")
def compiled_forward() -> None:
    model = vit()
    model.forward = _compiled(model.forward)
    pipeline(model, pictures(), reference=vit())


@brought("model", "nn.DataParallel, and DataParallel around a part")
def data_parallel() -> None:
    pipeline(nn.DataParallel(vit()), pictures())
    model = vit()
    model.blocks[1].mlp = nn.DataParallel(model.blocks[1].mlp)
    assert len(plan_of(pipeline(model, pictures())).ops) == 14


@brought("model", "averaged models: AveragedModel, ModelEma, ModelEmaV2, ModelEmaV3")
def averaged_models() -> None:
    for wrapper in (AveragedModel, timm.utils.ModelEma, timm.utils.ModelEmaV2, timm.utils.ModelEmaV3):
        _prepare(wrapper(vit()))
    pipeline(AveragedModel(vit()), pictures(), reference=vit())


@brought("model", "float16 weights", quick=True)
def half_weights() -> None:
    converted = pipeline(vit().half(), pictures(), reference=vit().half().float())
    assert converted(pictures().half()).dtype is torch.float32


@brought("model", "float16 weights, example and images, in a model that only torch.export traces")
def half_everything() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = vit()

        def forward(self, x: Tensor) -> Any:
            return self.net(x) if x.ndim == 4 else x

    model, images = Branching().eval(), pictures()
    converted = pipeline(
        copy.deepcopy(model).half(),
        images,
        example=images[:1].half(),
        data=images.half(),
        reference=model.half().float(),
    )
    assert converted(images.half()).dtype is torch.float32


@brought("model", "bfloat16 weights, and weights of several types")
def mixed_weights() -> None:
    model = vit().bfloat16()
    model.blocks[0].float()
    model.head.double()
    model.scale = torch.full((1,), 0.5, dtype=torch.float16)
    pipeline(model, pictures(), reference=copy.deepcopy(model).float())


@brought("model", "float64 weights")
def double_weights() -> None:
    pipeline(vit().double(), pictures(), reference=vit())


@brought("model", "a transformers model in float16")
def half_transformers() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=96, patch_size=8, num_labels=5)).eval()
    pipeline(copy.deepcopy(model).half(), pictures(), reference=model.half().float())


@contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _whole_way_under(mode: Any) -> None:
    model, images = vit(), pictures()
    with mode, tempfile.TemporaryDirectory() as folder:
        converted = ptq.quantize(model, images, qconfig_mapping=QUICK, progress=False)
        ptq.export_onnx(converted, Path(folder) / "m.onnx", images[:1])
        assert ptq.verify_onnx(Path(folder) / "m.onnx", converted, images).simulation.cosine > 0.999
        assert converted(images).shape == (6, 7)
    with torch.no_grad():
        output = converted(images)
        expected = ptq.quantize(model, images, qconfig_mapping=QUICK, progress=False)(images)
    torch.testing.assert_close(output, expected)


@brought("model", "everything under torch.no_grad")
def under_no_grad() -> None:
    _whole_way_under(torch.no_grad())


@brought("model", "everything under torch.inference_mode", quick=True)
def under_inference_mode() -> None:
    _whole_way_under(torch.inference_mode())


@brought("model", "everything under torch.set_grad_enabled(False)")
def without_gradients() -> None:
    _whole_way_under(torch.set_grad_enabled(False))
    torch.set_grad_enabled(True)


@brought("model", "everything under autocast")
def under_autocast() -> None:
    _whole_way_under(torch.autocast("cpu", dtype=torch.bfloat16))


@brought("model", "everything with float64 as torch's default type")
def under_default_dtype() -> None:
    _whole_way_under(_default_dtype())


@brought("model", "everything with another default device")
def under_default_device() -> None:
    model, images = vit(), pictures()
    with torch.device("meta"):
        converted = ptq.quantize(model, images, qconfig_mapping=QUICK, progress=False)
    assert converted(images).shape == (6, 7)


@brought("model", "a model and images that were made under torch.inference_mode")
def made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, images = vit(), pictures()
    pipeline(model, images)


class Dropping(nn.Module):
    """A head behind a dropout that is on in evaluation mode too, as F.dropout is by default."""

    def __init__(self, drop: Any) -> None:
        super().__init__()
        self.net, self.drop, self.head = vit(num_classes=0), drop, nn.Linear(48, 7)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.drop(self.net(x)))


@brought(
    "model", "F.dropout without training=", refused="bernoulli_ is random in module '(root)' (Dropping)", quick=True
)
def functional_dropout() -> None:
    pipeline(Dropping(lambda x: F.dropout(x, 0.3)).eval(), pictures())


@brought("model", "noise in the forward", refused="randn_like is random in module")
def noise() -> None:
    pipeline(Dropping(lambda x: x + torch.randn_like(x) * 0.1).eval(), pictures())


@brought("model", "attention with dropout that evaluation mode does not end", refused="bernoulli_ is random")
def attention_dropout() -> None:
    def drop(x: Tensor) -> Tensor:
        y = x[:, None, :].unflatten(-1, (4, 12))
        return F.scaled_dot_product_attention(y, y, y, dropout_p=0.5).flatten(1)

    pipeline(Dropping(drop).eval(), pictures())


@brought("model", "a counter that changes every forward", refused="take out what it keeps from one forward to the next")
def counter() -> None:
    class Counting(Dropping):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            return super().forward(x) * self.calls

    pipeline(Counting(nn.Identity()).eval(), pictures())


@brought("model", "random numbers that decide nothing")
def random_without_influence() -> None:
    pipeline(Dropping(lambda x: x + 0 * torch.rand(1)).eval(), pictures())


@brought("model", "torch.jit.trace(model)", refused="pass the module that torch.jit was given")
def jit_traced() -> None:
    pipeline(torch.jit.trace(vit(), pictures(1)), pictures())


@brought("model", "a scripted part", refused="module 'blocks.0.mlp': expected a float model")
def scripted_part() -> None:
    model = vit()
    model.blocks[0].mlp = torch.jit.script(nn.Sequential(nn.Linear(48, 48), nn.GELU()))
    pipeline(model, pictures())


@brought("model", "a dynamically quantized model", refused="which is quantized already")
def quantized_already() -> None:
    pipeline(torch.ao.quantization.quantize_dynamic(vit(), {nn.Linear}), pictures())


@brought("model", "a prepared model", refused="a model at stage 'observed'; pass the float model")
def prepared() -> None:
    _prepare(ptq.prepare_fx(vit(), QUICK, pictures(1)))


@brought("model", "a GraphModule of torch.fx, and the module of torch.export")
def graph_modules() -> None:
    pipeline(torch.fx.symbolic_trace(vit()), pictures())
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(vit(), (pictures(2),), dynamic_shapes={"x": {0: batch}})
    pipeline(program.module(), pictures(), reference=vit())


@brought("model", "a model on the meta device", refused="a weight on the meta device, without values")
def meta() -> None:
    with torch.device("meta"):
        model = vit()
    _prepare(model)


@brought("model", "a lazy layer that has not run", refused="run the model once on images")
def lazy() -> None:
    _prepare(nn.Sequential(vit(num_classes=0), nn.LazyLinear(7)))


@brought("model", "a complex weight", refused="two real weights")
def complex_weight() -> None:
    model = vit()
    model.filter = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    _prepare(model)


@brought("model", "a sparse weight", refused="layout torch.sparse_coo")
def sparse_weight() -> None:
    model = vit()
    model.head.weight = nn.Parameter(model.head.weight.detach().to_sparse())
    _prepare(model)


@brought("model", "an attribute that cannot be copied", refused="attribute 'stream' of module 'head'")
def uncopyable() -> None:
    model = vit()
    with Path(__file__).open(encoding="utf-8") as model.head.stream:
        _prepare(model)


@brought("model", "the class of a model", refused="got the class Dropping; create it: Dropping(...)")
def a_class() -> None:
    _prepare(Dropping)


@brought("model", "a state dict", refused="call model.load_state_dict(...) with this")
def state_dict() -> None:
    _prepare(vit().state_dict())


@brought("model", "the path of a checkpoint", refused="create the model and load its weights")
def a_path() -> None:
    _prepare("model.pth")


@brought("model", "a function that calls a model", refused="make it the forward of an nn.Module")
def a_function() -> None:
    model = vit()
    _prepare(lambda x: model(x).softmax(-1))


@brought("model", "an ONNX model", refused="pass the PyTorch module that it was made of")
def an_onnx_model() -> None:
    _prepare(onnx.ModelProto())


@brought("model", "a batch size that is written into the forward", quick=True)
def hard_coded_batch() -> None:
    class OneImage(Dropping):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).reshape(1, 7)

    model, images = OneImage(nn.Identity()).eval(), pictures()
    prepared = ptq.prepare_fx(model, QUICK, images[:1])
    ptq.calibrate(prepared, images, progress=False)
    converted = ptq.convert_fx(prepared)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ptq.export_onnx(converted, path, images[:1], batch=1)
        parity = ptq.verify_onnx(path, converted, images)
        assert parity.images == 6
        assert parity.simulation.cosine > 0.999
    with torch.no_grad():
        similar = [torch.cosine_similarity(converted(x), model(x)).item() for x in images.split(1)]
    assert min(similar) > 0.97


@brought("model", "images that are mixed across the batch")
def mixing() -> None:
    class Mixing(Dropping):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x + x.mean(0, keepdim=True))

    pipeline(Mixing(nn.Identity()).eval(), pictures())


@brought("model", "torchvision's create_feature_extractor", quick=True)
def feature_extractor() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = create_feature_extractor(vit(), return_nodes={"norm": "tokens", "head": "logits"})
    pipeline(model.eval(), pictures())
