"""Forwards that write into tensors: into their input, a part of it, views of a feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from brought import brought
from brought.pipeline import pictures, pipeline, sum_of_squares, vit


class Around(nn.Module):
    """A ViT whose forward is given."""

    def __init__(self, forward: Callable[..., Any], **arguments: Any) -> None:
        super().__init__()
        self.net, self.call = vit(**arguments), forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self.net, x)


def _images_stay(forward: Callable[..., Any]) -> None:
    """Take a forward that writes into its input through the pipeline, and see that nobody's images are changed."""
    images, example = pictures(), pictures(1)
    model = Around(forward).eval()
    with torch.no_grad():
        expected = model(images.clone())
    data = [pictures()[:4], pictures()[4:]]
    pipeline(model, images, example=example, data=data, reference=lambda _: expected)
    for now, before in ((images, pictures()), (example, pictures(1)), (torch.cat(data), pictures())):
        assert torch.equal(now, before), "the user's images were changed"


@brought("tracing", "a channel of the input is written: x[:, 0] = ...", quick=True)
def input_channel_written() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x[:, 0] = x[:, 0] * 0.5 + 0.1
        x[:, 1:].mul_(2)
        return net(x)

    _images_stay(forward)


@brought("tracing", "the input is normalized into itself: x.copy_(...)")
def input_copied_into() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x.copy_(x * 2)
        return net(x)

    _images_stay(forward)


@brought("tracing", "a view of the input is written: v = x.view(...); v -= ...")
def input_view_written() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        v = x.view(x.shape[0], -1)
        v -= v.mean(1, keepdim=True)
        return net(x)

    _images_stay(forward)


@brought("tracing", "the input is written through x.float() and out=")
def input_written_through_aliases() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        y = x.float().contiguous()
        y[:, 0] = y[:, 0] * 0.5
        torch.mul(x, 2, out=x)
        return net(x)

    _images_stay(forward)


@brought("tracing", "a masked part of the input is written: x[x > 1] = 1")
def input_masked_part_written() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x[x > 1] = 1.0
        x[..., 0].zero_()
        return net(x)

    _images_stay(forward)


def _features(forward: Callable[[Tensor], Any]) -> None:
    pipeline(Around(lambda net, x: forward(net.forward_features(x)), num_classes=0), pictures(), loss=sum_of_squares)


@brought("tracing", "a piece of chunk is written: a, b = f.chunk(2); a.mul_(2)", quick=True)
def chunk_written() -> None:
    def forward(f: Tensor) -> Any:
        a, b = f.chunk(2, -1)
        a.mul_(2)
        b[:, 0].add_(a[:, 1])
        return f.mean(1)

    _features(forward)


@brought("tracing", "a piece of unbind is written")
def unbind_written() -> None:
    def forward(f: Tensor) -> Any:
        a = f.unbind(1)
        a[0].add_(a[-1])
        return f.mean(1)

    _features(forward)


@brought("tracing", "a piece of split is written, through another view")
def split_written() -> None:
    def forward(f: Tensor) -> Any:
        _, b = torch.split(f, [1, 16], dim=1)
        b.transpose(1, 2)[..., 0] = 0.0
        return f.mean(1)

    _features(forward)


@brought("tracing", "a piece of tensor_split is written, and memory that swapdims shares")
def other_views_written() -> None:
    def forward(f: Tensor) -> Any:
        first, _, last = f.tensor_split(3, dim=2)
        last.mul_(2)
        f.swapdims(0, 1).add_(first[:1].mean())
        return f.mean(1)

    _features(forward)


def _two_views(cut: Callable[[Tensor, int], Any]) -> None:
    class Model(Around):
        def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
            f, g = cut(self.net(torch.cat([a, b])), a.shape[0])
            return f - g

    model = Model(lambda net, x: net(x), num_classes=0).eval()
    pipeline(model, (pictures(), pictures(seed=2)), loss=sum_of_squares)


@brought("tracing", "two views in one batch, cut apart by chunk(2)", quick=True)
def views_by_chunk() -> None:
    _two_views(lambda f, n: f.chunk(2))


@brought("tracing", "two views in one batch, cut apart by split(a.shape[0])")
def views_by_split() -> None:
    _two_views(lambda f, n: f.split(n))


@brought("tracing", "two views in one batch, cut apart by split([n, n])")
def views_by_sizes() -> None:
    _two_views(lambda f, n: torch.split(f, [n, n], dim=0))


@brought("tracing", "the first product's output is written in place")
def first_product_written() -> None:
    class Model(Around):
        def forward(self, x: Tensor) -> Any:
            f = self.net.patch_embed.proj(x)
            f[:, 0] = 0.5
            f.flatten(2)[..., 3].mul_(2)
            f = self.net._pos_embed(f.flatten(2).transpose(1, 2))
            return self.net.head(self.net.norm(self.net.blocks(f)).mean(1))

    pipeline(Model(lambda net, x: x).eval(), pictures())
