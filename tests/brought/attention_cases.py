"""Attention as people write it: nn.MultiheadAttention with its options, masks, fused functions by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brought import brought
from brought.pipeline import pictures, pipeline

TOKENS, DIM, HEADS = 16, 48, 3


class Tokens(nn.Module):
    """16 patches of 48 numbers, a residual attention, a head; forward takes images and what attention takes beside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.head = nn.Conv2d(3, DIM, 8, 8), nn.Linear(DIM, 7)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attend(self.norm(x) * 3, *more)).mean(1))

    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        raise NotImplementedError


class Multihead(Tokens):
    """nn.MultiheadAttention with options, called on tokens of 48 and keys of `kdim` numbers."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True} | options)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.key = nn.Linear(DIM, self.attention.kdim)
        self.call = call or {}

    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        keys = self.key(x) if self.attention.kdim != DIM else x
        if not self.attention.batch_first:
            x, keys = x.transpose(0, 1), keys.transpose(0, 1)
        y, weights = self.attention(x, keys, keys, **self.call)
        y = y if self.attention.batch_first else y.transpose(0, 1)
        needed = self.call.get("need_weights", True)
        return y + weights.flatten(2).mean(-1)[..., None].mean(1, keepdim=True) if needed else y


@brought("model", "nn.MultiheadAttention with bias_kv, zero_attn, kdim and vdim", quick=True)
def every_option() -> None:
    options = {"add_zero_attn": True, "add_bias_kv": True, "kdim": 32, "vdim": 32}
    pipeline(Multihead({"need_weights": False}, **options).eval(), pictures())


@brought("model", "nn.MultiheadAttention that returns its weights, batch second")
def weights_returned() -> None:
    pipeline(Multihead(batch_first=False).eval(), pictures())


@brought("model", "nn.MultiheadAttention that returns the weights of each head")
def weights_of_each_head() -> None:
    pipeline(Multihead({"average_attn_weights": False}).eval(), pictures())


@brought("model", "nn.MultiheadAttention without biases, other key size")
def without_biases() -> None:
    pipeline(Multihead(bias=False, kdim=24, vdim=24).eval(), pictures())


@brought("model", "nn.MultiheadAttention with a float mask")
def float_mask() -> None:
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf"))
    pipeline(Multihead({"attn_mask": mask}).eval(), pictures())


@brought("model", "nn.MultiheadAttention with a boolean mask")
def boolean_mask() -> None:
    pipeline(Multihead({"attn_mask": torch.ones(TOKENS, TOKENS).triu(1).bool()}).eval(), pictures())


class Padded(Multihead):
    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, key_padding_mask=more[0], need_weights=False)[0]
        return y


@brought("model", "nn.MultiheadAttention with a key_padding_mask as an input")
def key_padding_mask() -> None:
    padding = torch.arange(TOKENS) >= torch.tensor([16, 9, 12, 16, 1, 0])[:, None]
    pipeline(Padded().eval(), (pictures(), padding))


class ByHand(Tokens):
    """F.multi_head_attention_forward with parameters of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3 * DIM, DIM) * 0.2), nn.Parameter(torch.randn(3 * DIM))
        self.out = nn.Linear(DIM, DIM)

    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        none: Any = None
        y, _ = F.multi_head_attention_forward(
            *(x, x, x, DIM, HEADS, self.weight, self.bias, none, none, False, 0.0, self.out.weight, self.out.bias),
            training=False,
            need_weights=False,
        )
        return y.transpose(0, 1)


@brought("model", "F.multi_head_attention_forward by hand")
def by_hand() -> None:
    pipeline(ByHand().eval(), pictures())


class Fused(Tokens):
    """F.scaled_dot_product_attention of three heads, with a mask that `mask` makes of tokens and further inputs."""

    def __init__(self, mask: Callable[..., Tensor] | None = None, kv_heads: int = HEADS, **options: Any) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM // HEADS * kv_heads)
        self.v = nn.Linear(DIM, DIM // HEADS * kv_heads)
        self.mask, self.options = mask, options

    def attend(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = None if self.mask is None else self.mask(x, *more)
        y: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return y.transpose(1, 2).flatten(2)


VALID = torch.arange(TOKENS) < torch.tensor([16, 9, 12, 16, 1, 0])[:, None]


@brought("model", "padded batches: rows that are masked whole, a boolean mask", quick=True)
def masked_rows() -> None:
    model = Fused(lambda x, valid: valid[:, None, :, None] & valid[:, None, None, :])
    pipeline(model.eval(), (pictures(), VALID))


@brought("model", "padded batches: rows that are masked whole, a mask of -inf")
def masked_rows_by_infinity() -> None:
    def mask(x: Tensor, valid: Tensor) -> Tensor:
        return torch.zeros(valid.shape[0], 1, 1, TOKENS).masked_fill(~valid[:, None, None, :], float("-inf"))

    pipeline(Fused(mask).eval(), (pictures(), VALID))


@brought("model", "padded batches: a mask of -1e9, and of the smallest float")
def masked_rows_by_a_large_number() -> None:
    for low in (-1e9, torch.finfo(torch.float32).min):
        model = Fused(lambda x, valid, low=low: (~valid[:, None, None, :]).float() * low)
        pipeline(model.eval(), (pictures(), VALID))


@brought("model", "a mask that depends on the tokens themselves")
def data_dependent_mask() -> None:
    pipeline(Fused(lambda x: (x.mean(-1) > -0.1)[:, None, None, :]).eval(), pictures(), int8_cosine=0.9)


@brought("model", "causal attention")
def causal() -> None:
    pipeline(Fused(is_causal=True).eval(), pictures())


@brought("model", "grouped queries: several heads share keys and values")
def grouped_queries() -> None:
    pipeline(Fused(kv_heads=1, enable_gqa=True).eval(), pictures())


@brought("model", "dropout inside of the fused attention in evaluation mode", refused="in evaluation mode")
def dropout() -> None:
    pipeline(Fused(dropout_p=0.2).eval(), pictures())
