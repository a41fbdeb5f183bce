"""Only the tokens that are read are computed: the same bits, and nothing is narrowed that something else reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import model_of
from torch import nn
from torch.fx import Interpreter
from torch.utils._pytree import tree_leaves

import ptq4vit_fx as ptq
from ptq4vit_fx import api
from ptq4vit_fx.passes.graph.contract import history
from ptq4vit_fx.passes.graph.marks import planned_product
from ptq4vit_fx.passes.graph.operators import INTEGER_MATMUL
from ptq4vit_fx.pipeline import CONVERSION
from ptq4vit_fx.tools.families import find_family

QUICK = ptq.recipes.ptq4vit().with_search(n=2, rounds=1, screen_rows=16, confirm=1, max_shift=3)
X = torch.randn(3, 6, 4, 8, generator=torch.Generator().manual_seed(0))  # batch, tokens, heads, channels


def both(monkeypatch, model, images):
    """Return the model with narrowed tokens, and without; calibrated and prepared on one image alone."""
    prepared = ptq.prepare_fx(model, QUICK, images[:1])
    ptq.calibrate(prepared, images, progress=False, loss=lambda out: tree_leaves(out)[0].square().sum())
    converted = ptq.convert_fx(prepared)
    with monkeypatch.context() as patch:
        patch.setattr(api, "CONVERSION", CONVERSION.without("narrow_tokens"))
        return converted, ptq.convert_fx(prepared)


def narrowed(converted):
    return next(rewrite.count for rewrite in history(converted) if rewrite.name == "narrow_tokens")


def rows(converted, images):
    """Return product -> how many rows of it are computed, for all images together."""
    found = {}

    class Recorder(Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.target is INTEGER_MATMUL:
                found[planned_product(n)] = result.numel() // result.shape[-1]
            return result

    with torch.inference_mode():
        Recorder(converted).run(images)
    return found


def assert_same(mine, reference, images):
    with torch.inference_mode():
        for a, b in zip(tree_leaves(mine(images)), tree_leaves(reference(images)), strict=True):
            assert torch.equal(a, b)


def test_the_last_block_of_a_classifier_computes_one_token(monkeypatch, small_vit, small_images):
    mine, reference = both(monkeypatch, small_vit, small_images)
    assert_same(mine, reference, small_images)
    count, tokens, heads = len(small_images), 17, 2
    expected = rows(reference, small_images)
    assert expected["blocks.1.mlp.fc2"] == count * tokens
    last = ("blocks.1.attn.matmul_qk", "blocks.1.attn.matmul_av")
    one = dict.fromkeys(last, count * heads) | dict.fromkeys(
        ("blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"), count
    )
    assert rows(mine, small_images) == expected | one


@pytest.mark.parametrize(
    ("family", "least"),
    [
        *(("deit_distilled", 19), ("deit3", 21), ("vit_clip_quickgelu", 21), ("tnt", 19), ("coat", 33), ("cait", 1)),
        *(("vit_hybrid", 19), ("convit", 19), ("crossvit", 2), ("torchvision_vit", 9), ("hf_vit", 25)),
        *(("siglip", 0), ("swin", 0), ("samvit", 0), ("hf_dinov2", 0)),
    ],
)
def test_families(monkeypatch, family, least):
    entry = find_family(family)
    if entry.source == "huggingface":
        pytest.importorskip("transformers", reason="the extra hf is not installed")
    images = torch.randn(3, 3, entry.image, entry.image, generator=torch.Generator().manual_seed(0))
    mine, reference = both(monkeypatch, entry.create(), images)
    assert narrowed(mine) >= least
    assert (narrowed(mine) > 0) == (least > 0)
    assert_same(mine, reference, images)


def mlp(module, x):
    return module.second(F.gelu(module.first(x)))


def layers():
    return {"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)}


#: What is read of mlp(X), narrow in dimension 1, and how many of its tokens are computed.
READ = {
    "first": (lambda m, x: mlp(m, x)[:, 0], 1),
    "method": (lambda m, x: mlp(m, x).select(1, 2), 1),
    "a slice": (lambda m, x: mlp(m, x)[:, 1:4], 3),
    "the rest": (lambda m, x: mlp(m, x)[:, 3:], 3),
    "two, with a gap": (lambda m, x: (y := mlp(m, x))[:, 0] + y[:, 2], 3),
    "two, the later first": (lambda m, x: (y := mlp(m, x))[:, 4] + y[:, 2], 3),
    "two slices that overlap": (lambda m, x: (y := mlp(m, x))[:, 0:2] * y[:, 1:3], 3),
    "behind a permutation": (lambda m, x: mlp(m, x).permute(0, 2, 1, 3)[:, :, 1], 1),
    "behind a swap": (lambda m, x: mlp(m, x).transpose(1, -2)[:, :, 1], 1),
    "behind a reshape": (lambda m, x: mlp(m, x).reshape(x.shape[0], x.shape[1], 32)[:, 1], 1),
    "behind a flatten": (lambda m, x: mlp(m, x).flatten(2)[:, 1], 1),
    "behind a norm": (lambda m, x: F.layer_norm(mlp(m, x), (8,))[:, 1], 1),
    "behind a softmax": (lambda m, x: torch.softmax(mlp(m, x), -1)[:, 1], 1),
    "plus a residual": (lambda m, x: (x + mlp(m, x))[:, 5], 1),
    "plus a table": (lambda m, x: (mlp(m, x) + torch.arange(6.0).view(1, 6, 1, 1))[:, 5], 1),
    "all but one": (lambda m, x: mlp(m, x)[:, 1:], 6),
    "all of them too": (lambda m, x: ((y := mlp(m, x))[:, 0], y.mean(1)), 6),
    "the shape too": (lambda m, x: (y := mlp(m, x))[:, 0] * y.shape[1], 6),
    "an image": (lambda m, x: mlp(m, x)[0], 6),
    "the last": (lambda m, x: mlp(m, x)[:, -1], 6),
    "every other": (lambda m, x: mlp(m, x)[:, 0:4:2], 6),
    "two dimensions": (lambda m, x: mlp(m, x)[:, 0, 1], 6),
    "other dimensions": (lambda m, x: (y := mlp(m, x))[:, 0].sum() + y[:, :, 0].sum(), 6),
    "behind a norm of tokens": (lambda m, x: F.layer_norm(mlp(m, x), (6, 4, 8))[:, 1], 6),
    "behind a softmax of tokens": (lambda m, x: torch.softmax(mlp(m, x), 1)[:, 1], 6),
    "behind a reshape of tokens": (lambda m, x: mlp(m, x).reshape(-1, 3, 64)[:, 1], 6),
    "behind a roll": (lambda m, x: mlp(m, x).roll(1, 1)[:, 1], 6),
    "tokens in front of the batch": (lambda m, x: mlp(m, x.transpose(0, 1)).transpose(0, 1)[:, 1], 6),
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.filterwarnings("ignore::ptq4vit_fx.errors.PTQWarning")
def test_what_is_read_decides_what_is_computed(monkeypatch, read):
    function, tokens = READ[read]
    mine, reference = both(monkeypatch, model_of(function, **layers()), X)
    assert_same(mine, reference, X)
    assert_same(mine, reference, X[:1])
    assert rows(reference, X) == {"first": 3 * 6 * 4, "second": 3 * 6 * 4}
    assert rows(mine, X) == {"first": 3 * tokens * 4, "second": 3 * tokens * 4}


def attention(module, x):
    x = x.flatten(2)
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (module.q(x), module.k(x), module.v(x)))
    return (torch.softmax(q @ k.transpose(-2, -1), -1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dim", [1, 3])
def test_heads_and_columns_of_a_product_are_not_narrowed(monkeypatch, dim):
    def read(module, x):
        q, k = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (module.q(x.flatten(2)), module.k(x.flatten(2))))
        return (q @ k.transpose(-2, -1)).select(dim, 1)

    mine, reference = both(monkeypatch, model_of(read, q=nn.Linear(32, 32), k=nn.Linear(32, 32)), X)
    assert_same(mine, reference, X)
    assert rows(mine, X) == rows(reference, X)


@pytest.mark.parametrize("swapped", [False, True])
def test_queries_are_narrowed_keys_and_values_are_not(monkeypatch, swapped):
    """Scales per head: their axis is not the tokens'. Whoever reads all queries keeps all of them."""

    def read(module, x):
        out = attention(module, x)
        return out.sum(1) if swapped else out[:, 0]

    projections = {name: nn.Linear(32, 32) for name in "qkv"}
    mine, reference = both(monkeypatch, model_of(read, **projections), X)
    assert_same(mine, reference, X)
    found = rows(mine, X)
    queries = 6 if swapped else 1
    assert (found["q"], found["k"], found["v"]) == (3 * queries, 18, 18)
    assert (found["matmul_qk"], found["matmul_av"]) == (3 * 4 * queries, 3 * 4 * queries)
