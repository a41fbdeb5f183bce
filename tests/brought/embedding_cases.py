"""Tables of embeddings: bags of words, and rows that torch shortens when it reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brought import brought
from brought.pipeline import pictures, pipeline, vit


class Bagged(nn.Module):
    """Features of an image plus those of four words per image, pooled by a function of the case's choice."""

    def __init__(self, pool: Callable[[Any, Tensor], Tensor], table: nn.Module) -> None:
        super().__init__()
        self.net, self.pool, self.table, self.head = vit(num_classes=0), pool, table, nn.Linear(48, 7)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return self.head(self.net(x) + self.pool(self.table, words))  # type: ignore[no-any-return]


WORDS = torch.randint(0, 20, (6, 4), generator=torch.Generator().manual_seed(0))
#: Padding in front, behind, and alone.
PADDED = WORDS * torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]])


def bag(mode: str, pool: Callable[[Any, Tensor], Tensor], words: Tensor = WORDS, **arguments: Any) -> None:
    torch.manual_seed(0)
    table = nn.EmbeddingBag(20, 48, mode=mode, **arguments)
    pipeline(Bagged(pool, table).eval(), (pictures(), words))


@brought("model", "an nn.EmbeddingBag of words beside the image", quick=True)
def embedding_bag() -> None:
    bag("mean", lambda table, words: table(words))


@brought("model", "nn.EmbeddingBag: the maximum, padding, weights of the words, F.embedding_bag, offsets of one step")
def embedding_bags() -> None:
    for mode in ("sum", "mean", "max"):
        bag(mode, lambda table, words: table(words), PADDED, padding_idx=0)
    bag("max", lambda table, words: table(words))
    bag("sum", lambda table, words: table(words, per_sample_weights=words * 0.1))
    bag("mean", lambda table, words: F.embedding_bag(words, table.weight, mode="max"))
    bag("mean", lambda table, words: table(words.flatten(), torch.arange(0, words.numel(), 4)))
    bag("mean", lambda table, words: table(words) if len(words) < 99 else words)  # through torch.export


@brought(
    "model", "an nn.EmbeddingBag with offsets", refused="expected bags of one length, got embedding_bag with offsets"
)
def bags_with_offsets() -> None:
    bag("mean", lambda table, words: table(words.flatten(), torch.arange(words.shape[0]) * 4))


@brought("model", "embeddings with max_norm, whose rows torch shortens when it reads them")
def limited_embeddings() -> None:
    def unseen(pool: Callable[[Any, Tensor], Tensor], table: nn.Module) -> None:
        """Calibrate on some words; the file reads others, which nothing has shortened before."""
        pipeline(Bagged(pool, table).eval(), (pictures(), WORDS), data=[(pictures(), WORDS % 3)])

    torch.manual_seed(0)
    unseen(lambda table, words: table(words).mean(1), nn.Embedding(20, 48, max_norm=1.0))
    unseen(lambda table, words: table(words), nn.EmbeddingBag(20, 48, mode="max", max_norm=1.0, norm_type=1.0))
    unseen(lambda table, words: F.embedding(words, table.weight, max_norm=0.5).sum(1), nn.Embedding(20, 48))
    unseen(
        lambda table, words: table(words).mean(1) if len(words) < 99 else words,  # through torch.export
        nn.Embedding(20, 48, max_norm=1.0),
    )
