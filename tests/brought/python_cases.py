"""Everyday Python in a forward: hand-written transformers that read sizes, types and modes in every way."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, pipeline


class Written(nn.Module):
    """A plain ViT of one block with nn.MultiheadAttention, its steps as methods that the cases write in their way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.patches = 48, nn.Conv2d(3, 48, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 48))
        self.positions = nn.Parameter(torch.randn(1, 17, 48) * 0.3)
        self.norm, self.attention = nn.LayerNorm(48), nn.MultiheadAttention(48, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))
        self.blocks = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 48)])
        self.head = nn.Linear(48, 7)

    def embed(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def attend(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)  # type: ignore[no-any-return]

    def with_token(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions

    def body(self, x: Tensor) -> Tensor:
        return self.attend(self.with_token(self.embed(x)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x)[:, 0])


@brought("tracing", "len(x) for the batch, with nn.MultiheadAttention", quick=True)
def length() -> None:
    class Model(Written):
        def with_token(self, x: Tensor) -> Tensor:
            return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions

    pipeline(Model().eval(), pictures())


def tokens_for(x: Tensor, token: Tensor) -> Tensor:
    return token.repeat(len(x), 1, 1)


@brought("tracing", "len(x) in a helper function")
def length_in_a_helper() -> None:
    class Model(Written):
        def with_token(self, x: Tensor) -> Tensor:
            return torch.cat([tokens_for(x, self.token), x], 1) + self.positions

    pipeline(Model().eval(), pictures())


@brought("tracing", "int(x.shape[0]), int(x.size(1))", quick=True)
def integer_sizes() -> None:
    class Model(Written):
        def with_token(self, x: Tensor) -> Tensor:
            batch, tokens = int(x.shape[0]), int(x.size(1))
            x = x.reshape(batch, tokens, self.dim)
            return torch.cat([self.token.expand(batch, -1, -1), x], 1) + self.positions[:, : tokens + 1]

    pipeline(Model().eval(), pictures())


@brought("tracing", "b, n, c = x.shape and b, n, c = x.size()")
def unpacked_shape() -> None:
    class Model(Written):
        def with_token(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            rows, _, _ = x.size()
            return torch.cat([self.token.expand(rows, 1, c), x.view(b, n, c)], 1) + self.positions

    pipeline(Model().eval(), pictures())


@brought("tracing", "x.numel() // k for a reshape")
def numel() -> None:
    class Model(Written):
        def with_token(self, x: Tensor) -> Tensor:
            x = x.reshape(x.numel() // (16 * self.dim), 16, self.dim)
            return torch.cat([self.token.expand(x.size()[0], -1, -1), x], 1) + self.positions

    pipeline(Model().eval(), pictures())


@brought("tracing", "assertions on shapes, types and dimensions")
def assertions() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            assert torch.is_tensor(x)
            assert isinstance(x, Tensor), f"expected a tensor, got {type(x)}"
            assert x.ndim == 4
            assert x.shape[1] == 3, f"expected RGB images, got {x.shape}"
            assert x.shape[-1] == x.shape[-2] == 32, f"Input size {x.shape[-2:]} is not 32"
            assert x.dtype is torch.float32
            assert x.device == self.token.device
            return super().forward(x)

    pipeline(Model().eval(), pictures())


@brought("tracing", "isinstance decides between a tensor and a mapping", quick=True)
def isinstance_decides() -> None:
    class Model(Written):
        def forward(self, x: Any) -> Any:
            if not isinstance(x, Tensor):
                x = x["image"] * 0
            return super().forward(x)

    pipeline(Model().eval(), pictures())


@brought("tracing", "errors with f-strings in branches that are not taken")
def raising_branches() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            if x.shape[-1] % 8 != 0:
                raise ValueError(f"width {x.shape[-1]} is not a multiple of 8")
            if x.dim() != 4:
                raise ValueError(f"got {x.dim()} dimensions")
            return super().forward(x)

    pipeline(Model().eval(), pictures())


@brought("tracing", "a dictionary of features, and zip over nn.ModuleLists")
def dictionary_of_features() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            features = {"patches": self.embed(x)}
            for i, (block, name) in enumerate(zip(self.blocks, ("a", "b"), strict=True)):
                features[name] = F.gelu(block(features["patches"])) * (i + 1)
            names = [name for name in features if name != "patches"]
            x = torch.stack([features[name] for name in names]).sum(0)
            return self.head(self.attend(self.with_token(x))[:, 0])

    pipeline(Model().eval(), pictures())


@brought("tracing", "range(x.shape[1]) and math.sqrt of a size")
def ranges_of_sizes() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            x = sum((x[:, channel : channel + 1] for channel in range(x.shape[1])), torch.zeros(1)) + x
            x = self.embed(x)
            side = int(math.sqrt(x.shape[1]))
            x = x.transpose(1, 2).reshape(x.shape[0], -1, side, side).flatten(2).transpose(1, 2)
            return self.head(self.attend(self.with_token(x))[:, 0])

    pipeline(Model().eval(), pictures())


@brought("tracing", "training, jit and autograd modes asked for in a forward")
def modes() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            if self.training:
                x = x + torch.randn_like(x)
            if torch.jit.is_tracing() or torch.jit.is_scripting() or x.requires_grad:
                x = x * 1.0
            if x.is_cuda or x.device.type == "mps":
                x = x.half()
            return super().forward(x)

    pipeline(Model().eval(), pictures())


@brought("tracing", "a branch for batches of more than 64 images")
def branch_on_the_batch() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            if x.shape[0] > 64:
                x = x * 2
            return super().forward(x)

    pipeline(Model().eval(), pictures())


@brought("tracing", "x.new_zeros, torch.arange and masks of the batch's size")
def made_of_sizes() -> None:
    class Model(Written):
        def with_token(self, x: Tensor) -> Tensor:
            n = len(x)
            token = x.new_zeros(n, 1, self.dim) + self.token
            order = torch.arange(x.shape[1], device=x.device)
            mask = torch.ones(n, x.shape[1], 1, dtype=x.dtype, device=x.device)
            return torch.cat([token, x[:, order] * mask], dim=1) + self.positions

    pipeline(Model().eval(), pictures())


@brought("tracing", "max and min of sizes, list(x.shape), torch.Size arithmetic")
def arithmetic_of_sizes() -> None:
    class Model(Written):
        def with_token(self, x: Tensor) -> Tensor:
            shape = list(x.shape)
            shape[1] = max(1, min(x.shape[1], 1))
            token = self.token.expand(torch.Size(shape))
            return torch.cat([token, x.reshape(*x.shape[:2], -1)], 1) + self.positions

    pipeline(Model().eval(), pictures())


@brought("tracing", "keyword-only arguments and defaults that are no None")
def defaults() -> None:
    class Model(Written):
        def forward(self, x: Tensor, scale: float = 2.0, *, pool: str = "token", normalize: bool = True) -> Any:
            y = self.body(x * scale if normalize else x)
            return self.head(y[:, 0] if pool == "token" else y.mean(1))

    pipeline(Model().eval(), pictures())


@brought("tracing", "a keyword-only image")
def keyword_only() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Written()

        def forward(self, *, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
            return self.inner(pixel_values)

    model = Model().eval()
    pipeline(model, pictures(), reference=lambda x: model(pixel_values=x))


@brought("tracing", "*args and **kwargs passed through by a wrapper")
def passed_through() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Written()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    pipeline(Model().eval(), pictures())


@brought("tracing", "caches of what depends on shapes, on the module and on its class")
def caches() -> None:
    class Model(Written):
        grid: Tensor
        shared: dict[Any, Any] = {}  # noqa: RUF012 - as people write it

        def embed(self, x: Tensor) -> Tensor:
            x = super().embed(x)
            if not hasattr(self, "grid") or self.grid.shape[0] != x.shape[0]:
                self.grid = torch.linspace(-1, 1, 48).expand(x.shape[0], 1, 48)
            if x.shape[1] not in self.shared:
                self.shared[x.shape[1]] = x.new_ones(1, 1, 48) * 0.5
            return x + self.grid + self.shared[x.shape[1]]

    model = Model().eval()
    pipeline(model, pictures())
    assert [(n, type(x)) for n, x in Model.shared.items()] == [(16, Tensor)], "what the tracer saw leaked"
    model(pictures(5))


_grids: dict[str, Tensor] = {}


@functools.lru_cache
def _steps(count: int) -> Tensor:
    return torch.linspace(0, 1, count)[:, None]


@brought("tracing", "caches that every batch size fills anew: on a class, in a global, in functools.cache")
def shared_caches() -> None:
    class Model(Written):
        last: Tensor | None = None

        def embed(self, x: Tensor) -> Tensor:
            x = super().embed(x)
            if Model.last is None or Model.last.shape[0] != x.shape[0]:
                Model.last = x.new_ones(x.shape[0], 1, 48) * 0.5
            if "grid" not in _grids or _grids["grid"].shape[0] != x.shape[0]:
                _grids["grid"] = torch.linspace(-1, 1, 48).expand(x.shape[0], 1, 48)
            return x + Model.last + _grids["grid"] + _steps(x.shape[1])

    model, images = Model().eval(), pictures()
    expected = model(images)
    ptq.prepare_fx(model, QUICK, images[:1])
    assert torch.equal(model(images), expected), "what the tracer saw leaked"
    assert torch.equal(model(images[:2]), expected[:2]) or len(images) > 2
    _steps.cache_clear()
    pipeline(model, images)


@brought("tracing", "a cache by batch size", refused="a forward for any batch size")
def cache_by_batch() -> None:
    class Model(Written):
        def embed(self, x: Tensor) -> Tensor:
            x = super().embed(x)
            self.grids = getattr(self, "grids", {})
            if x.shape[0] not in self.grids:
                self.grids[x.shape[0]] = torch.ones(x.shape[0], 1, 48)
            return x + self.grids[x.shape[0]]

    pipeline(Model().eval(), pictures())


@brought("tracing", "control flow on values", refused="a forward without control flow that depends on tensor values")
def control_flow_on_values() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            x = x * 2 if x.mean() > 0 else x
            return super().forward(x)

    pipeline(Model().eval(), pictures())


@brought("tracing", "a number read with .item()", refused="if limit > 1")
def item() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            limit = x.abs().max().item()
            return super().forward(x / limit if limit > 1 else x)

    pipeline(Model().eval(), pictures())


@brought("tracing", "NumPy inside of a forward", refused="computes with NumPy")
def numpy_inside() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            return super().forward(torch.from_numpy(x.detach().numpy() * 2))

    pipeline(Model().eval(), pictures())


@brought("tracing", "a loop over the images of a batch", refused="[self.head(image[0]) for image in x]")
def loop_over_images() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Any:
            x = self.body(x)
            return torch.stack([self.head(image[0]) for image in x])

    pipeline(Model().eval(), pictures())
