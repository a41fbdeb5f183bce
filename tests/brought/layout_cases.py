"""Where the images are: not always in the first dimension of a product's operands."""

from __future__ import annotations

from torch import Tensor, nn

from brought import brought
from brought.attention_cases import DIM, HEADS, Tokens
from brought.pipeline import pictures, pipeline


class Layout(Tokens):
    """A fused projection of q, k, v, and an attention in one of several layouts."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.qkv, self.layout = nn.Linear(DIM, 3 * DIM), layout

    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        images, tokens, _ = x.shape
        if self.layout == "tokens first":
            x = x.transpose(0, 1)
        parts = self.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS))
        if self.layout == "heads first":
            q, k, v = parts.permute(2, 3, 0, 1, 4)
        elif self.layout == "tokens first":
            q, k, v = parts.permute(2, 1, 3, 0, 4)
        else:
            q, k, v = parts.permute(2, 0, 3, 1, 4).flatten(1, 2)
        y = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        if self.layout == "heads first":
            return y.permute(1, 2, 0, 3).flatten(2)
        return y.reshape(images, HEADS, tokens, -1).transpose(1, 2).flatten(2)


@brought("model", "attention with the heads in front of the images", quick=True)
def heads_first() -> None:
    pipeline(Layout("heads first").eval(), pictures())


@brought("model", "attention over heads and images in one dimension")
def heads_and_images() -> None:
    pipeline(Layout("one").eval(), pictures())


@brought("model", "tokens in front of the images, a smaller last batch", quick=True)
def tokens_first() -> None:
    pipeline(Layout("tokens first").eval(), pictures())


class AmongImages(Tokens):
    """Features that attend to those of the other images in the batch, or to prototypes that the model makes."""

    def __init__(self, *, prototypes: bool) -> None:
        super().__init__()
        self.keys = nn.Embedding(5, 7) if prototypes else None

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        features = super().forward(x)
        if self.keys is not None:
            return features @ self.keys.weight.softmax(-1).t()
        return (features @ features.t()).softmax(-1) @ features

    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        return x


@brought("model", "similarity with prototypes that the model makes")
def prototypes() -> None:
    pipeline(AmongImages(prototypes=True).eval(), pictures())


@brought("model", "images of a batch that attend to each other")
def among_images() -> None:
    pipeline(AmongImages(prototypes=False).eval(), pictures())
