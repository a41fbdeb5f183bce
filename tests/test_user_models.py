"""Models that are nobody's library: own attention classes, parts left alone, several inputs and outputs."""

from __future__ import annotations

import warnings

import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.contract import history, plan_of

QUICK = ptq.recipes.ptq4vit().with_search(n=10, rounds=1)
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Attention(nn.Module):
    """Talking heads, a relative bias and a gate, the products written as einsum."""

    def __init__(self, dim: int = 16, heads: int = 2, tokens: int = 17) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mix = nn.Linear(heads, heads)
        self.bias = nn.Parameter(torch.randn(heads, tokens, tokens))
        self.gate = nn.Linear(dim, dim)

    def split(self, x):
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1)

    def forward(self, x):
        q, (k, v) = self.split(self.to_q(x)), map(self.split, self.to_kv(x).chunk(2, -1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale + self.bias
        scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        values = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        return self.out(values * torch.sigmoid(self.gate(x)))


class HandWritten(nn.Module):
    """A ViT of 16 patches and a class token, with QuickGELU."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.norm, self.attention = nn.LayerNorm(16), attention()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.attention(self.norm(x))
        x = x + self.down(quick_gelu(self.up(x)))
        return self.head(x[:, 0])


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@torch.fx.wrap
def hidden_attention(x, weight):
    """A function that torch.fx does not look into, with products inside."""
    return F.linear((x @ x.transpose(-2, -1)).softmax(-1) @ x, weight)


def test_a_hand_written_vit(tmp_path):
    model = HandWritten().eval()
    prepared = ptq.prepare_fx(model, QUICK, IMAGES[:1])
    plan = prepared.plan
    assert {op.name for op in plan.ops} == {
        *("patches", "attention.to_q", "attention.to_kv", "attention.mix", "attention.gate", "attention.out"),
        *("attention.matmul", "attention.matmul_av", "up", "down", "head"),  # q and k: heads talk before the softmax
    }
    assert plan.op("attention.matmul_av").lhs_source == "softmax"
    assert plan.op("down").lhs_source == "quick_gelu"
    torch.testing.assert_close(prepared(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    ptq.calibrate(prepared, IMAGES, progress=False)
    converted = ptq.convert_fx(prepared)
    assert torch.cosine_similarity(converted(IMAGES), model(IMAGES)).min() > 0.9999
    ptq.export_onnx(converted, tmp_path / "model.onnx", IMAGES[:1])
    assert ptq.verify_onnx(tmp_path / "model.onnx", converted, IMAGES).simulation.cosine > 0.9999


class Fused(nn.Module):
    """nn.MultiheadAttention, which torch.fx does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def test_multihead_attention_is_opened():
    model = HandWritten(Fused).eval()
    prepared = ptq.prepare_fx(model, QUICK, IMAGES[:1])
    assert history(prepared)[0].name == "trace_by_export"
    kinds = [op.kind for op in prepared.plan.ops if op.name.startswith("attention.")]
    assert sorted(kinds) == ["linear", "linear", "matmul", "matmul"]
    assert not prepared.plan.float_ops
    for batch in (1, 5):
        torch.testing.assert_close(prepared(IMAGES[:batch]), model(IMAGES[:batch]), rtol=1e-5, atol=1e-5)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return hidden_attention(x, self.weight)


def test_products_inside_of_a_wrapped_function_are_seen():
    plan = ptq.prepare_fx(HandWritten(Wrapped).eval(), QUICK, IMAGES[:1]).plan
    assert sum(op.kind == "matmul" for op in plan.ops) == 2
    assert plan.op("attention").kind == "linear"
    assert not plan.float_ops


@pytest.mark.parametrize("leaf", [Attention, "attention"], ids=["type", "path"])
@pytest.mark.parametrize("attention", [Attention, Fused], ids=["own", "nn.MultiheadAttention"])
def test_leaf_modules_stay_closed_and_float(leaf, attention):
    leaf = attention if leaf is Attention else leaf
    model = HandWritten(attention).eval()
    with pytest.warns(ptq.PTQWarning, match=f"attention stays float: {attention.__name__} is not traced into"):
        prepared = ptq.prepare_fx(model, QUICK, IMAGES[:1], leaf_modules=[leaf])
    assert {op.name for op in prepared.plan.ops} == {"patches", "up", "down", "head"}
    torch.testing.assert_close(prepared(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    ptq.calibrate(prepared, IMAGES, progress=False)
    assert torch.cosine_similarity(ptq.convert_fx(prepared)(IMAGES), model(IMAGES)).min() > 0.999


def test_leaf_modules_stay_float_where_only_torch_export_gets_through():
    class Branching(Fused):
        def forward(self, x):
            return super().forward(x) if x.shape[0] > 0 else x

    with pytest.warns(ptq.PTQWarning, match="is one of leaf_modules"):
        prepared = ptq.prepare_fx(HandWritten(Branching).eval(), QUICK, IMAGES[:1], leaf_modules=["attention.inner"])
    assert not any(op.name.startswith("attention.") for op in prepared.plan.ops)


def test_names_of_parts_that_do_not_exist_are_errors_with_near_names():
    model = HandWritten().eval()
    with pytest.raises(
        ptq.PTQError, match=r"leaf_modules: expected a module of the model, got 'atention'; .*attention"
    ):
        ptq.prepare_fx(model, QUICK, IMAGES[:1], leaf_modules=["atention"])
    with pytest.raises(ptq.PTQError, match="got 'Conv3d'; near names:"):
        ptq.prepare_fx(model, QUICK, IMAGES[:1], leaf_modules=[nn.Conv3d])
    with pytest.raises(ptq.PTQError, match=r"near names: attention\.mix"):
        ptq.prepare_fx(model, QUICK, IMAGES[:1], skip=["attention.mi"])


def test_skip_leaves_products_float():
    model = HandWritten().eval()
    plan = plan_of(ptq.prepare_fx(model, QUICK, IMAGES[:1], skip=["attention", "head"]))
    assert [op.name for op in plan.ops] == ["patches", "up", "down"]
    assert len(plan.float_ops) == 8
    assert plan.float_ops[-1].reason == "left float by skip 'head'"
    assert QUICK.changes == ()


def test_skip_of_what_is_not_traced_into_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ptq.PTQWarning)
        model = HandWritten(Fused).eval()
        plan = plan_of(ptq.prepare_fx(model, QUICK, IMAGES[:1], leaf_modules=["attention"], skip="attention"))
    assert [(op.name, op.asked) for op in plan.float_ops] == [("attention", True)]


class Detector(nn.Module):
    """A backbone in a larger graph: two inputs, two outputs, no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = HandWritten()
        self.size, self.box, self.score = nn.Linear(2, 5), nn.Linear(5, 4), nn.Linear(5, 1)

    def forward(self, image, size, scale: float = 1.0):
        x = F.gelu(self.backbone(image) + self.size(size))
        return {"boxes": self.box(x) * scale, "scores": self.score(x).sigmoid()}


def test_several_inputs_and_outputs_with_a_given_loss(tmp_path):
    model, sizes = Detector().eval(), torch.rand(6, 2)
    prepared = ptq.prepare_fx(model, QUICK, (IMAGES[:2], sizes[:2]))
    data = [(IMAGES[:4], sizes[:4], torch.zeros(4)), (IMAGES[4:], sizes[4:], torch.zeros(2))]
    with pytest.raises(ptq.PTQError, match=r"got dict; pass loss="):
        ptq.calibrate(prepared, data, progress=False)
    with pytest.raises(ptq.PTQError, match="expected a tuple that starts with 2 tensors"):
        ptq.calibrate(prepared, IMAGES, progress=False)
    ptq.calibrate(prepared, data, progress=False, loss=lambda out: out["boxes"].square().sum() + out["scores"].sum())
    converted = ptq.convert_fx(prepared)
    expected, actual = model(IMAGES, sizes), converted(IMAGES, sizes)
    assert (actual["boxes"] - expected["boxes"]).norm() < 0.02 * expected["boxes"].norm()
    path = tmp_path / "model.onnx"
    ptq.export_onnx(converted, path, (IMAGES[:1], sizes[:1]))
    graph = onnx.load(path).graph
    assert [entry.name for entry in graph.input] == ["image", "size"]
    assert [entry.name for entry in graph.output] == ["boxes", "scores"]
    report = ptq.verify_onnx(path, converted, data)
    assert report.images == 6
    assert report.simulation.cosine > 0.9999


class Logits(dict):
    """Hugging Face's kind of output."""


class WithLogits(HandWritten):
    def forward(self, pixel_values, labels=None):
        return Logits(logits=super().forward(pixel_values), hidden=pixel_values)


def test_an_output_with_logits_keeps_all_of_them_and_the_loss_is_that_of_the_logits():
    model = WithLogits().eval()
    prepared = ptq.prepare_fx(model, QUICK, IMAGES[:1])
    torch.testing.assert_close(prepared(IMAGES), dict(model(IMAGES)), rtol=1e-5, atol=1e-5)
    ptq.calibrate(prepared, IMAGES, progress=False)


def test_a_model_of_any_image_size_is_fixed_to_the_size_of_the_example():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=1, num_heads=2, dynamic_img_size=True, num_classes=5
    ).eval()
    images = torch.randn(4, 3, 48, 32)
    prepared = ptq.prepare_fx(model, QUICK, images[:1])
    torch.testing.assert_close(prepared(images), model(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ptq.PTQError, match=r"expected shape \(batch, 3, 48, 32\), the size that the model was prepared"
    ):
        ptq.calibrate(prepared, torch.randn(4, 3, 64, 64), progress=False)
    ptq.calibrate(prepared, images, progress=False)
    with pytest.raises(ptq.PTQError, match="verify_onnx: batch 0, input x: expected shape"):
        ptq.verify_onnx("not-read.onnx", ptq.convert_fx(prepared), torch.randn(4, 3, 64, 64))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) if float(x.sum()) > 0 else x


def test_an_error_of_both_tracers_names_the_line_and_the_way_out():
    with pytest.raises(ptq.PTQError, match=r"float\(x.sum\(\)\).*leaf_modules= \(torch.export does not get through"):
        ptq.prepare_fx(Untraceable(), QUICK, torch.randn(1, 1, 4, 4))
