"""Models that do not run on the example, and why: the sentence names the cause, the module and the line."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, vit


def _prepare(model: Any, *example: Any) -> None:
    ptq.prepare_fx(model, QUICK, example if len(example) > 1 else example[0])


class Wrapped(nn.Module):
    """A ViT whose forward is given."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.net, self.call = vit(), forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self.net, x)


@brought("tracing", "images of another size", refused="expected a size that the model accepts, got", quick=True)
def another_size() -> None:
    _prepare(vit(), pictures(1, 3, 40, 40))


@brought("tracing", "images of three channels for a model of one", refused="expected as many channels as the model has")
def another_channel_count() -> None:
    _prepare(vit(in_chans=1), pictures(1))


@brought("tracing", "an input that forward needs is missing", refused="give sizes too: example_inputs=(x, sizes)")
def missing_input() -> None:
    class TwoInputs(nn.Module):
        def forward(self, x: Tensor, sizes: Tensor, scale: float = 1.0) -> Tensor:
            return x.mean((1, 2, 3)) * sizes * scale

    _prepare(TwoInputs(), pictures(1))


@brought("tracing", "more inputs than forward takes", refused="pass")
def too_many_inputs() -> None:
    _prepare(nn.Sequential(vit()), pictures(1), pictures(1), pictures(1))


@brought("tracing", "a model without a forward", refused="define forward")
def no_forward() -> None:
    class Empty(nn.Module):
        pass

    _prepare(Empty(), pictures(1))


@brought("tracing", "an assertion of the model's own", refused="AssertionError: images must lie between 0 and 1")
def own_assertion() -> None:
    def checked(net: nn.Module, x: Tensor) -> Any:
        if x.min() < 0:
            raise AssertionError("images must lie between 0 and 1")
        return net(x)

    _prepare(Wrapped(checked).eval(), pictures(1))


@brought("tracing", "half() in the middle of a forward", refused="take casts to another type")
def cast_inside() -> None:
    _prepare(Wrapped(lambda net, x: net(x.half())).eval(), pictures(1))


@brought("tracing", "a package that is not installed", refused="install that package")
def missing_package() -> None:
    def imported(net: nn.Module, x: Tensor) -> Any:
        import flash_attn_of_nobody  # type: ignore[import-not-found]

        return flash_attn_of_nobody(net(x))

    _prepare(Wrapped(imported).eval(), pictures(1))


@brought("tracing", "not enough memory", refused="expected memory for one forward")
def out_of_memory() -> None:
    _prepare(Wrapped(lambda net, x: net(x) + torch.empty(2**60).sum()).eval(), pictures(1))


@brought("tracing", "an embedding of floats", refused="pass that input as torch.int64")
def float_tokens() -> None:
    _prepare(nn.Sequential(nn.Embedding(9, 48), nn.Linear(48, 7)), torch.rand(2, 5))


@brought("tracing", "a linear layer on the wrong width", refused="module 'inner.fc' (Linear)")
def wrong_width() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(47, 7)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.inner = vit(num_classes=0), Inner()

        def forward(self, x: Tensor) -> Any:
            return self.inner(self.net(x))

    _prepare(Outer().eval(), pictures(1))


@torch.library.custom_op("brought::unknown_shape", mutates_args=())
def unknown_shape(x: Tensor) -> Tensor:
    return x * 2


@brought("tracing", "a custom operator without a fake implementation, in front of a branch", refused="register_fake")
def operator_without_fake() -> None:
    _prepare(Wrapped(lambda net, x: net(unknown_shape(x) if x.shape[0] < 9 else x)).eval(), pictures(1))


@brought("tracing", "what the tracers print goes nowhere")
def silence() -> None:
    class Recorder:
        text = ""

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None:
            pass

    recorder: Any = Recorder()
    before, sys.stderr = sys.stderr, recorder
    try:
        _prepare(Wrapped(lambda net, x: net(x) if x.sum() > 0 else x).eval(), pictures(1))
    except ptq.PTQError:
        pass
    finally:
        sys.stderr = before
    assert not recorder.text, recorder.text


def _draw(forward: Any) -> None:
    """Prepare a forward that flips images by chance, for many seeds: one that is accepted is traced one way."""
    for seed in range(12):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        state = random.getstate()
        try:
            _prepare(Wrapped(forward), pictures(1))
        except ptq.PTQError as error:
            refusal = error
        else:
            raise AssertionError(f"accepted for seed {seed}")
        assert random.getstate() == state
    raise refusal


@brought("tracing", "images flipped by random.random()", refused="a forward that draws from random", quick=True)
def drawn_by_python() -> None:
    _draw(lambda net, x: net(x.flip(-1)) if random.random() < 0.5 else net(x))


@brought("tracing", "images flipped by numpy.random", refused="a forward that draws from numpy.random")
def drawn_by_numpy() -> None:
    _draw(lambda net, x: net(x.flip(-1)) if np.random.rand() < 0.5 else net(x))


@brought("tracing", "images flipped by a generator of the model's", refused="draws from module '(root)', generator")
def drawn_by_own_generator() -> None:
    class Model(Wrapped):
        generator = np.random.default_rng(0)

        def forward(self, x: Tensor) -> Any:
            return self.net(x.flip(-1) if self.generator.random() < 0.5 else x)

    _prepare(Model(lambda net, x: net(x)), pictures(1))


@brought("tracing", "images flipped by torch.rand", refused="rand is random in")
def drawn_by_torch() -> None:
    _draw(lambda net, x: net(x.flip(-1)) if torch.rand(()) < 0.5 else net(x))
