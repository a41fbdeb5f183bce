"""Forwards that do not compute the same for any number of images: the line, and what helps there."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, vit


class Wrapped(nn.Module):
    """A ViT whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.call = vit(), forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self.net, x)


@contextlib.contextmanager
def also(*words: str) -> Iterator[None]:
    """Check that a refusal has all of these words."""
    try:
        yield
    except ptq.PTQError as error:
        missing = [word for word in words if word not in str(error)]
        if missing:
            raise AssertionError(f"{missing} not in {error}") from error
        raise


def _prepare(forward: Callable[[Any, Tensor], Any]) -> None:
    ptq.prepare_fx(Wrapped(forward).eval(), QUICK, pictures(1))


WHOLE = "line takes for a constant; compute on the whole batch instead of pieces of it"


@brought("tracing", "torch.vmap over the images", refused="a forward without torch.vmap and", quick=True)
def vmap() -> None:
    _prepare(lambda net, x: torch.vmap(lambda image: net(image[None])[0])(x))


@brought("tracing", "torch.vmap over the logits", refused="compute on whole batches: the layers of a model take them")
def vmap_over_logits() -> None:
    _prepare(lambda net, x: torch.vmap(lambda y: y / y.abs().max())(net(x)))


@brought("tracing", "torch.vmap over the weights of an ensemble", refused="(call, in_dims=(0, 0, None))(*stacked, x)")
def vmap_over_weights() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        def call(parameters: Any, buffers: Any, x: Tensor) -> Any:
            return torch.func.functional_call(net, (parameters, buffers), (x,))

        stacked = torch.func.stack_module_state([net, net])
        return torch.vmap(call, in_dims=(0, 0, None))(*stacked, x).mean(0)

    _prepare(forward)


@brought("tracing", "torch.func.jacrev in a forward", refused="torch.vmap and the other transforms of torch.func")
def jacobian() -> None:
    _prepare(lambda net, x: torch.func.jacrev(lambda images: net(images).sum())(x).flatten(1)[:, :7])


@brought("tracing", "a branch on an even number of images", refused="if x.shape[0] % 2 == 0:", quick=True)
def even_batch() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        if x.shape[0] % 2 == 0:
            x = x * 2
        return net(x)

    with also("leave the condition on the number of images out of that line"):
        _prepare(forward)


@brought("tracing", "a branch on len(x) % 2, in a module", refused="if len(x) % 2:")
def odd_batch_in_a_module() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) % 2:
                x = x * 2
            return x

    with also("module '1' (Doubled)", "expected the same computation for any batch size, got a condition on"):
        ptq.prepare_fx(nn.Sequential(vit(), Doubled()).eval(), QUICK, pictures(1))


@brought("tracing", "a branch on one image", refused="leave the condition on the number of images out of that line")
def branch_on_one_image() -> None:
    _prepare(lambda net, x: net(x) if x.shape[0] == 1 else net(x) * 2)


@brought("tracing", "a loop over x.split(2) of the batch", refused=WHOLE, quick=True)
def split_batch() -> None:
    _prepare(lambda net, x: torch.cat([net(part) for part in x.split(2)]))


@brought("tracing", "a loop over x.chunk(3) of the batch", refused="for part in x.chunk(3)")
def chunked_batch() -> None:
    _prepare(lambda net, x: torch.cat([net(part) for part in x.chunk(3)]))


@brought("tracing", "a loop over x.unbind(0)", refused=WHOLE)
def unbound_batch() -> None:
    _prepare(lambda net, x: torch.cat([net(image[None]) for image in x.unbind(0)]))


def _export(pieces: Callable[[Tensor], Any], images: int = 4, **arguments: Any) -> None:
    """Export a model whose head adds two pieces of the batch, for any number of images."""

    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Any:
            first, second = pieces(x)
            return first + second

    model = nn.Sequential(vit(), Pairs()).eval()
    prepared = ptq.prepare_fx(model, QUICK, pictures(images))
    ptq.calibrate(prepared, list(pictures(2 * images).split(images)), progress=False)
    with tempfile.TemporaryDirectory() as folder, also("module '1', "):
        ptq.export_onnx(ptq.convert_fx(prepared), Path(folder) / "model.onnx", pictures(images), **arguments)


@brought(
    "file", "a batch of pairs, split(2), a file of any batch", refused="got IndexError: tuple index out", quick=True
)
def pairs_by_split() -> None:
    _export(lambda x: x.split(2))


@brought("file", "a batch of pairs, chunk(2), a file of any batch", refused="compute on the whole batch instead of pie")
def pairs_by_chunk() -> None:
    _export(lambda x: x.chunk(2))


@brought("file", "a batch of pairs, tensor_split(2), a file of any batch", refused="expected a forward for any number")
def pairs_by_tensor_split() -> None:
    _export(lambda x: x.tensor_split(2))


@brought("file", "a batch of pairs, split([1, 3]), a file of any batch", refused="pass batch=4, the number of images")
def pairs_by_sections() -> None:
    _export(lambda x: x.split([1, 3]))


@brought("file", "a batch of pairs, a file of that batch")
def pairs_of_one_batch() -> None:
    _export(lambda x: x.split(2), batch=4)
    _export(lambda x: x.chunk(2), batch=4)


def _calibrate(model: nn.Module, example: Any, data: Any, **arguments: Any) -> None:
    """Calibrate a model that cannot run then; nothing but the sentence is said."""
    prepared = ptq.prepare_fx(model.eval(), QUICK, example, **arguments)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            ptq.calibrate(prepared, data, progress=False)
        finally:
            assert not said.getvalue(), said.getvalue()


@brought("data", "a closed module that gradients stop, nothing on stderr", refused="without changing a tensor in place")
def stopped_by_gradients() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Any:
            x.chunk(7, dim=1)[0].mul_(2)
            return x

    with also("module '1', ", "x.chunk(7, dim=1)[0].mul_(2)"):
        _calibrate(nn.Sequential(vit(), Written()), pictures(1), pictures(), leaf_modules=["1"])


@brought(
    "data", "words that the table does not have, nothing on stderr", refused="IndexError: index out of", quick=True
)
def unknown_words() -> None:
    with also("module '0', ", "run the float model on them and mend what it raises"):
        model = nn.Sequential(nn.Embedding(9, 48), nn.Flatten(), nn.Linear(4 * 48, 7))
        _calibrate(model, torch.zeros(1, 4).long(), torch.full((4, 4), 9))


@brought("data", "a file verified on words that the table does not have", refused="verify_onnx: module '0', ")
def unknown_words_of_a_file() -> None:
    model = nn.Sequential(nn.Embedding(9, 48), nn.Flatten(), nn.Linear(4 * 48, 7)).eval()
    words = torch.arange(16).view(4, 4) % 9
    converted = ptq.quantize(model, words, qconfig_mapping=QUICK, progress=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
        path = Path(folder) / "model.onnx"
        ptq.export_onnx(converted, path, words)
        try:
            ptq.verify_onnx(path, converted, words + 9)
        finally:
            assert not said.getvalue(), said.getvalue()


@brought("data", "images that torch.linalg.cholesky refuses, nothing on stderr", refused="not positive-definite")
def refused_images() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return net(x) + torch.linalg.cholesky(x).sum((1, 2, 3))[:, None]

    images = torch.eye(32).expand(4, 3, 32, 32)
    with also("the model's own forward, ", "return net(x) + torch.linalg.cholesky", "run the float model on them"):
        _calibrate(Wrapped(forward), images[:1], -images)
