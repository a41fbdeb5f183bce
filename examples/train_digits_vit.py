"""Train the embedded digits model from scratch, in a few minutes on two CPU cores.

    python examples/train_digits_vit.py --out digits_vit.safetensors

The recipe was chosen on a part of the training images; the test images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ptq4vit_fx.files import write_file
from ptq4vit_fx.tools.digits import CHECKPOINT, build_model, load_digits_images

SEED = 0
EPOCHS = 60
WARM_UP_EPOCHS = 3
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.3
LABEL_SMOOTHING = 0.05
AVERAGE_DECAY = 0.99

#: Standard deviation of the position embedding at the start: timm's 0.02 is lost beside the patches of so few images.
POSITION_STD = 0.5

#: The width of one of the 8 scanned pixels where the image reaches from -1 to 1.
PIXEL = 2 / 8


def augment(images: Tensor) -> Tensor:
    """Return the images (batch, 1, 16, 16), each turned, slanted, resized, shifted by at most a pixel, with noise."""
    # A strength per image: interpolation blurs, and the model must also see digits that are nearly sharp.
    turn, slant, grow_x, grow_y, shift_x, shift_y = (torch.rand(6, len(images)) * 2 - 1) * torch.rand(len(images))
    row_x = torch.stack([1 + 0.15 * grow_x, 0.2 * slant - 0.2 * turn, 0.75 * shift_x * PIXEL], 1)
    row_y = torch.stack([0.2 * turn, 1 + 0.15 * grow_y, 0.75 * shift_y * PIXEL], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(images.shape), align_corners=False)
    # Outside the image grid_sample reads 0, so the background, -1, has to be 0 in the meantime.
    moved = (F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False) - 1).clamp(-1, 1)
    return moved + 0.05 * torch.randn_like(moved)


def learning_rate_factor(step: int, steps: int, warm_up_steps: int) -> float:
    """Return the share of the peak learning rate: a linear rise, then half a cosine down to zero."""
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up_steps) / (steps - warm_up_steps))


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """Return a model trained on images (count, 1, 16, 16) and labels (count,): the running average of its weights."""
    model = build_model()
    nn.init.normal_(model.get_parameter("pos_embed"), std=POSITION_STD)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
    # Weight decay pulls matrices only: biases, norms and embeddings are not what overfits.
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and name not in ("pos_embed", "cls_token")]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or name in ("pos_embed", "cls_token")]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        fused=True,
    )
    per_epoch = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, EPOCHS * per_epoch, WARM_UP_EPOCHS * per_epoch)
    )
    for epoch in range(EPOCHS):
        total_loss, hits = 0.0, 0
        batches = torch.randperm(len(images))[: per_epoch * BATCH_SIZE].split(BATCH_SIZE)
        bar = tqdm(batches, desc=f"epoch {epoch + 1}/{EPOCHS}")
        for done, batch in enumerate(bar, start=1):
            logits = model(augment(images[batch]))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            total_loss += loss.item()
            hits += int((logits.argmax(1) == labels[batch]).sum())
            bar.set_postfix(loss=f"{total_loss / done:.3f}", accuracy=f"{hits / (done * BATCH_SIZE):.2%}")
    return average.module


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images, 0 to 1, that the model labels correctly."""
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, report and write the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the embedded digits model from scratch.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint to write (default: %(default)s)")
    out = parser.parse_args().out
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    started = time.perf_counter()
    train_images, train_labels = load_digits_images("train")
    model = train(train_images, train_labels)
    print(f"trained in {time.perf_counter() - started:.0f} s")
    print(f"train accuracy: {accuracy(model, train_images, train_labels):.2%}")
    print(f"test accuracy:  {accuracy(model, *load_digits_images('test')):.2%}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, save(model.state_dict()), "train_digits_vit")
    print(f"wrote {out} ({out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
