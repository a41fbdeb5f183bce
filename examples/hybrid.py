"""What the steps for convolutions keep of hybrids of convolutions and attention, and what they do to the time of files.

    python examples/hybrid.py kept --bits W8A8 --bits W6A6
    python examples/hybrid.py faster mobilevit_s tiny_vit_5m_224

What they keep: of a hybrid of inverted residuals and attention, a small MobileViT, trained here. Before training, the
weights of its batch norms are drawn log-normally with the standard deviation --spread, so that channels differ as they
do after long training on many images; with --spread 0 they start at 1. Trained weights are kept in --weights-in and
reused. Chosen on training images, counted on the 500 test images, in PyTorch, as simulate.py does. SNR: that of the
depthwise convolutions against the float model, least and mean.

What they do to time: of models of timm with random weights, whose batch norms have seen the images.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import timm
import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from runtimes import in_onnxruntime
from safetensors.torch import load_file, save_file
from simulate import simulation, widths
from timm.models import mobilevit
from timm.models.byobnet import ByobNet, ByoModelCfg
from torch import Tensor, nn
from train_digits_vit import augment, learning_rate_factor

import ptq4vit_fx as ptq
from ptq4vit_fx.export.proof.latency import in_turn
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.quantizers import Uniform
from ptq4vit_fx.tools.digits import load_digits_images

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
EPOCHS = 14
MODELS = ("mobilevit_s", "mobilevitv2_050", "tiny_vit_5m_224", "efficientformerv2_s0", "edgenext_xx_small", "pvt_v2_b0")
BATCH_SIZE = 32
LEARNING_RATE = 2e-3


def uniform(mapping: ptq.QConfigMapping, bits: int, **transforms: float) -> ptq.QConfigMapping:
    """Return the mapping with one grid, from SiLU's minimum on, in the place of a twin in front of convolutions."""
    qconfig = mapping.global_qconfig
    assert qconfig is not None
    grid = Uniform(bits, signed=False)
    return mapping.with_transforms(**transforms).set_global(replace(qconfig, convolved=grid))


def without_convolutions(w: int, a: int) -> ptq.QConfigMapping:
    """Return the recipe `best` without what it does for convolutions."""
    mapping = ptq.recipes.best(w, a)
    qconfig = mapping.global_qconfig
    assert qconfig is not None
    return mapping.with_transforms(convolutions=0.0, depthwise=0.0).set_global(replace(qconfig, convolved=None))


#: What is done -> bits of weights and activations -> the recipe.
STEPS: dict[str, Callable[[int, int], ptq.QConfigMapping]] = {
    "none (`ptq4vit`)": ptq.recipes.ptq4vit,
    "rounding": lambda w, a: ptq.recipes.ptq4vit(w, a).with_search(rounding="gram"),
    "uniform": lambda w, a: uniform(ptq.recipes.ptq4vit(w, a), a),
    "uniform, depthwise 1": lambda w, a: uniform(ptq.recipes.ptq4vit(w, a), a, depthwise=1.0),
    "`best` without what is for convolutions": without_convolutions,
    "the same, uniform": lambda w, a: uniform(without_convolutions(w, a), a),
    "the same, uniform, depthwise 1": lambda w, a: uniform(without_convolutions(w, a), a, depthwise=1.0),
    "the same, uniform, depthwise 1, convolutions 0.5 (`best`)": ptq.recipes.best,
}


def build(spread: float) -> nn.Module:
    """Return an untrained hybrid for images (batch, 1, 16, 16) and ten classes."""
    residual, attention = mobilevit._inverted_residual_block, mobilevit._mobilevit_block
    blocks = (
        residual(d=2, c=24, s=1, br=4.0),
        attention(d=1, c=32, s=2, transformer_dim=48, transformer_depth=2, patch_size=2, br=4.0),
        attention(d=1, c=48, s=1, transformer_dim=64, transformer_depth=1, patch_size=2, br=4.0),
    )
    settings = {"stem_chs": 16, "stem_type": "3x3", "stem_pool": "", "downsample": "", "num_features": 96}
    model = ByobNet(ByoModelCfg(blocks, act_layer="silu", **settings), num_classes=10, in_chans=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 1.0)
            module.weight.data.mul_(torch.randn_like(module.weight).mul(spread).exp())
    return model


def trained(spread: float, folder: Path) -> nn.Module:
    """Return the trained hybrid: from the folder, or trained now and kept there."""
    torch.manual_seed(0)
    model, path = build(spread), folder / f"hybrid_{spread:g}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    images, labels = load_digits_images("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * math.ceil(len(images) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, steps // 10))
    for _ in track(range(EPOCHS), "training"):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = F.cross_entropy(model(augment(images[batch])), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


@torch.inference_mode()
def measured(
    model: nn.Module, mapping: ptq.QConfigMapping, first: int, count: int
) -> tuple[float, Tensor, list[float]]:
    """Return top-1 on the test images, the divergence of each, and the SNR of each depthwise convolution, in dB."""
    pixels = load_digits_images("train")[0][first : first + count]
    images, labels = load_digits_images("test")
    with torch.inference_mode(False):
        prepared = ptq.prepare_fx(model, mapping, pixels[:1])
        calibration = ptq.calibrate(prepared, pixels, progress=False)
    logits, reference = simulation(prepared)(images).log_softmax(1), model(images).log_softmax(1)
    snr = [calibration.snr[op.name] for op in plan_of(prepared).ops if op.groups > 1]
    right = float((logits.argmax(1) == labels).float().mean())
    return right, (reference.exp() * (reference - logits)).sum(1), snr


@app.command()
def kept(
    bits: Annotated[list[str], typer.Option(help="W8A8, W4A8, ..., repeatable")] = ["W8A8", "W6A6"],  # noqa: B006
    step: Annotated[list[str] | None, typer.Option(help="a row, by its name, repeatable (default: all)")] = None,
    first: Annotated[list[int], typer.Option(help="number of the first of the 32 images, repeatable")] = [0, 32],  # noqa: B006
    spread: float = 1.0,
    calibration_images: int = 32,
    weights_in: Annotated[Path, typer.Option(help="folder of trained weights")] = Path("out/hybrids"),
) -> None:
    """Print one Markdown row per step and width, of a hybrid trained on the digits."""
    torch.set_num_threads(2)
    model = trained(spread, weights_in)
    images, labels = load_digits_images("test")
    with torch.inference_mode():
        right = float((model(images).argmax(1) == labels).float().mean())
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"\nhybrid of {count:,} parameters, spread {spread:g}, float {right:.1%}, {len(images)} test images\n")
    print("| step | bits | KL | top-1 | SNR, depthwise |\n|---|---|---|---|---|")
    for name in step or STEPS:
        for weights, activations in map(widths, bits):
            found = [measured(model, STEPS[name](weights, activations), one, calibration_images) for one in first]
            far, snr = torch.cat([one[1] for one in found]), [value for one in found for value in one[2]]
            tops = ", ".join(f"{one[0]:.1%}" for one in found)
            error = float(far.std()) / math.sqrt(len(far))
            print(f"| {name} | W{weights}A{activations} | {float(far.mean()):.4f} ± {error:.4f} | {tops} ", end="")
            print(f"| {min(snr):.1f}, {sum(snr) / len(snr):.1f} dB |", flush=True)


def random(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model of timm with random weights, and random images of its size that its batch norms have seen."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).train()
    images = torch.randn(8, *timm.data.resolve_data_config(model=model)["input_size"])
    with torch.no_grad():
        for _ in range(3):
            model(images)
    return model.eval(), images


@app.command()
def faster(
    models: Annotated[list[str] | None, typer.Argument(help="of timm")] = None,
    rounds: Annotated[int, typer.Option(help="of measuring, the two files in turn")] = 9,
) -> None:
    """Print one Markdown row per model: milliseconds of four images without what is for convolutions and with it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    recipes = {"before": without_convolutions(8, 8), "best": ptq.recipes.best()}
    print("| model | before | `best` | SNR |\n|---|---|---|---|")
    for name in models or MODELS:
        (model, images), runs, snr = random(name), {}, []
        with torch.no_grad():
            reference = model(images)
        with tempfile.TemporaryDirectory() as folder:
            for recipe, mapping in recipes.items():
                prepared = ptq.prepare_fx(model, mapping, images[:1])
                ptq.calibrate(prepared, images[:4], progress=False)
                path = Path(folder) / f"{recipe}.onnx"
                ptq.export_onnx(ptq.convert_fx(prepared), path, images[:1])
                run = in_onnxruntime(path, 2)
                noise = reference - torch.from_numpy(run(images))
                snr.append(10 * math.log10(float(reference.square().sum() / noise.square().sum())))
                runs[recipe] = partial(run, images[:4])
            taken = in_turn(runs, rounds=rounds)
        times = " | ".join(f"{taken.spread(recipe).median:.0f} ms" for recipe in recipes)
        print(f"| `{name}` | {times} | {', '.join(f'{x:.1f}' for x in snr)} dB |", flush=True)


if __name__ == "__main__":
    app()
