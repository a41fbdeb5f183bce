"""Balances: channels scaled and shifted where they are written and back where they are read; the function stays."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.balances import LEAST_RANGE, ChannelAffine, balanced_ranges, matched_ranges
from ptq4vit_fx.calibrating.ranges import OUTSIDE, Extremes
from ptq4vit_fx.passes.apply_balances import apply_balances
from ptq4vit_fx.passes.graph.contract import plan_of, sharing_tensors

ALL = {"norms": 1.0, "attention": 1.0, "gates": 1.0}
QUICK = ptq.recipes.ptq4vit().with_search(n=8, rounds=1)
BALANCED = QUICK.with_transforms(**ALL)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 7}
DINO = {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3}
STAGES = {"depths": (2, 1), "num_heads": (2, 4), "embed_dim": 32}

finite = st.floats(-100, 100, width=32)


def trained_like(model: nn.Module) -> nn.Module:
    """Return the model with norms, biases and scales as training leaves them: all channels differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                spread = torch.randn(parameter.shape, generator=generator) * 0.5
                parameter.mul_(spread.exp()) if name.endswith("weight") else parameter.add_(spread)
    return model.eval()


def family(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return trained_like(timm.create_model(name, **arguments))


def noted(prepared) -> list[str]:
    """Return what was found, each a line, without repetition."""
    lines = [f"{t.transform} {t.name}: {'' if t.done else 'no, '}{t.note}" for t in plan_of(prepared).transformed]
    return list(dict.fromkeys(lines))


def drawn(prepared, seed: int = 3) -> dict[str, ChannelAffine]:
    """Return numbers of every balance that nobody would measure: the function must stay whatever they are."""
    generator = torch.Generator().manual_seed(seed)
    return {
        balance.name: ChannelAffine(
            torch.randn(balance.channels, generator=generator)
            .mul(0.5)
            .exp()[list(balance.alike or range(balance.channels))],
            torch.randn(balance.channels, generator=generator) * balance.shifts,
        )
        for balance in plan_of(prepared).balances
    }


def differences(prepared, images) -> list[float]:
    """Return by how much balancing changes the outputs, relative, on two sizes of batch."""
    balanced = apply_balances(sharing_tensors(prepared), drawn(prepared))
    with torch.no_grad():
        pairs = [(prepared(batch), balanced(batch)) for batch in (images, images[:2])]
    return [float((ours - own).norm() / own.norm()) for own, ours in pairs]


def images_of(size: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


VIT = [
    "norms blocks.0.norm1: 48 channels scaled and shifted",
    "attention blocks.0.attn.matmul_qk: 48 channels scaled and shifted",
    "attention blocks.0.attn.matmul_av: 48 channels scaled and shifted",
    "norms blocks.0.norm2: 48 channels scaled and shifted",
    "norms norm: 48 channels scaled and shifted",
]


def test_every_place_of_a_plain_vit_is_balanced():
    prepared = ptq.prepare_fx(family("vit_tiny_patch16_224", **SMALL), BALANCED, images_of(32, 1))
    assert noted(prepared) == VIT
    assert len(plan_of(prepared).balances) == 5
    assert max(differences(prepared, images_of(32))) < 1e-5


def test_what_is_not_asked_for_is_not_done():
    model = family("vit_tiny_patch16_224", **SMALL)
    prepared = ptq.prepare_fx(model, QUICK.with_transforms(attention=0.5), images_of(32, 1))
    assert noted(prepared) == VIT[1:3]
    assert noted(ptq.prepare_fx(model, QUICK, images_of(32, 1))) == []


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, **STAGES}),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 64, **STAGES}),
    "cait": ("cait_xxs24_224", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "dinov2": ("vit_small_patch14_reg4_dinov2", DINO),
    "swiglu": ("vit_giant_patch14_dinov2", DINO),
    "eva02": ("eva02_tiny_patch14_224", DINO),
    "dinov3": ("vit_small_patch16_dinov3", {**SMALL, "img_size": 64}),
    "beit": ("beit_base_patch16_224", SMALL),
    "parallel": ("vit_small_patch16_18x2_224", SMALL),
    "attention pool": ("vit_base_patch16_siglip_224", SMALL),
    "rms": ("vit_tiny_patch16_224", {**SMALL, "norm_layer": "rmsnorm"}),
}


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::ptq4vit_fx.PTQWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_their_function(name):
    architecture, arguments = FAMILIES[name]
    size = arguments["img_size"]
    prepared = ptq.prepare_fx(family(architecture, **arguments), BALANCED, images_of(size, 1))
    assert noted(prepared)
    assert max(differences(prepared, images_of(size))) < 2e-5


class Block(nn.Module):
    """Attention of two heads, with a way to do something else between its parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head, self.mix = nn.Linear(16, 5), nn.Linear(2, 2)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.heads(self.qkv(self.behind_norm(self.norm(x))))
        scores = self.scores(q @ k.transpose(-2, -1) * 0.35)
        out = (self.probabilities(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        return self.head(x + self.proj(self.behind_values(out))).mean(1)

    def heads(self, qkv):
        return qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)

    def behind_norm(self, x):
        return x

    def scores(self, scores):
        return scores

    def probabilities(self, probabilities):
        return probabilities

    def behind_values(self, out):
        return out


class NormReadTwice(Block):
    def behind_norm(self, x):
        self.seen = None
        return x + x.tanh()


class NormByPosition(Block):
    def behind_norm(self, x):
        return F.layer_norm(x, (16,), self.norm.weight, self.norm.bias, 1e-6)


class ModuleOfRms(Block):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16)  # type: ignore[assignment]


class Capped(Block):
    def scores(self, scores):
        return 5 * torch.tanh(scores / 5)


class Masked(Block):
    def scores(self, scores):
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~keep, float("-inf")) + 0.1 * torch.arange(16.0)


class MaskedByANumber(Block):
    def scores(self, scores):
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~keep, -4.0)


class Sink(Block):
    """One key more that nobody attends to: rows of what is left sum to less than 1."""

    def scores(self, scores):
        return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)

    def probabilities(self, probabilities):
        return probabilities[..., :-1]


class TalkingHeads(Block):
    def probabilities(self, probabilities):
        return self.mix(probabilities.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Kept(Block):
    def behind_values(self, out):
        return F.gelu(out)


class Rotated(Block):
    """Positions by rotation: pairs of channels of q and of k are added to each other."""

    def heads(self, qkv):
        q, k, v = super().heads(qkv)
        angle = torch.arange(16.0)[:, None] * torch.arange(1, 5)
        cosine, sine = self.spread(angle.cos()), self.spread(angle.sin())
        return self.turned(q, cosine, sine), self.turned(k, cosine, sine), v

    def spread(self, x):
        return x.repeat(1, 2)

    def turned(self, x, cosine, sine):
        return x * cosine + torch.cat([-x[..., 4:], x[..., :4]], -1) * sine


class RotatedInPlaceOfNeighbours(Rotated):
    """Pairs of neighbours, the first token left as it is, the sum written the other way round."""

    def spread(self, x):
        return x.repeat_interleave(2, 1)

    def turned(self, x, cosine, sine):
        crossed = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        turned = (crossed * sine + cosine * x).to(x.dtype)
        return torch.cat([x[..., :1, :], turned[..., 1:, :]], 2)


class RotatedAsComplex(Rotated):
    """Both sums begin with the same channel."""

    def turned(self, x, cosine, sine):
        one, other, cosine, sine = x[..., :4], x[..., 4:], cosine[:, :4], sine[:, :4]
        return torch.cat([one * cosine - other * sine, one * sine + other * cosine], -1)


class GatedQueries(Block):
    """Linear in appearance: the factor is made of the channels that it multiplies."""

    def heads(self, qkv):
        q, k, v = super().heads(qkv)
        return q * q.tanh(), k, v


class ShiftedQueries(Block):
    """A sum with what is not scaled."""

    def heads(self, qkv):
        q, k, v = super().heads(qkv)
        return -(q + torch.arange(8.0)), k, v


class ScaledKeys(Block):
    """A factor of each channel, which a shift would not go through."""

    def heads(self, qkv):
        q, k, v = super().heads(qkv)
        return q, -k * torch.arange(16.0)[:, None], v


class KeysAreValues(Block):
    def heads(self, qkv):
        q, k, _ = super().heads(qkv)
        return q, k, k


ANY = "48 channels scaled"
QK, AV, NORM = "attention matmul_qk: ", "attention matmul_av: ", "norms norm: "
BOTH = "16 channels scaled and shifted"
SCALED = "16 channels scaled"
TWICE = "norms layer_norm: " + BOTH


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Block, [NORM + BOTH, QK + BOTH, AV + BOTH]),
        (NormReadTwice, [NORM + "no, tanh reads it, which is no product with a stored weight", QK + BOTH, AV + BOTH]),
        (
            NormByPosition,
            [NORM + "no, layer_norm reads it, which is no product with a stored weight", TWICE, QK + BOTH, AV + BOTH],
        ),
        (ModuleOfRms, [NORM + "no, it is a module of torch.nn, RMSNorm, which stays one", QK + BOTH, AV + BOTH]),
        (Capped, [NORM + BOTH, QK + SCALED, AV + BOTH]),
        (Masked, [NORM + BOTH, QK + BOTH, AV + BOTH]),
        (MaskedByANumber, [NORM + BOTH, QK + SCALED, AV + BOTH]),
        (Sink, [NORM + BOTH, QK + SCALED, AV + SCALED]),
        (Kept, [NORM + BOTH, QK + BOTH, AV + "no, gelu reads it, which is no product with a stored weight"]),
        (Rotated, [NORM + BOTH, QK + SCALED, AV + BOTH]),
        (RotatedInPlaceOfNeighbours, [NORM + BOTH, QK + SCALED, AV + BOTH]),
        (RotatedAsComplex, [NORM + BOTH, QK + SCALED, AV + BOTH]),
        (GatedQueries, [NORM + BOTH, QK + "no, tanh reads its queries too", AV + BOTH]),
        (ShiftedQueries, [NORM + BOTH, QK + "no, its queries are changed on their way from qkv_1", AV + BOTH]),
        (ScaledKeys, [NORM + BOTH, QK + SCALED, AV + BOTH]),
        (
            KeysAreValues,
            [NORM + BOTH, QK + "no, matmul_av reads its keys too", AV + "no, matmul_qk reads its values too"],
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_near_misses_are_left_alone_and_said(kind, expected):
    images = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    prepared = ptq.prepare_fx(trained_like(kind()), BALANCED, images[:1])
    assert noted(prepared) == expected
    assert max(differences(prepared, images)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        (Rotated, [first + 8 * head for head in range(2) for first in (0, 1, 2, 3, 0, 1, 2, 3)]),
        (RotatedAsComplex, [first + 8 * head for head in range(2) for first in (0, 1, 2, 3, 0, 1, 2, 3)]),
        (RotatedInPlaceOfNeighbours, [first for first in range(0, 16, 2) for _ in range(2)]),
        (ScaledKeys, []),
    ],
)
def test_channels_that_are_added_have_one_scale(tmp_path, kind, pairs):
    images = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    prepared = ptq.prepare_fx(trained_like(kind()), QUICK.with_transforms(attention=1.0), images[:1])
    balance = next(b for b in plan_of(prepared).balances if b.kind == "key")
    assert list(balance.alike) == pairs
    calibration = ptq.calibrate(prepared, images, loss=lambda out: out.square().sum(), progress=False)
    scale = calibration.balances[balance.name].scale
    assert torch.equal(scale, scale[list(balance.alike or range(16))])
    assert len(scale.unique()) == (8 if pairs else 16)
    calibration.save(tmp_path / "scales.safetensors")
    assert ptq.Calibration.load(tmp_path / "scales.safetensors").plan == calibration.plan
    if pairs:
        wrong = with_number(calibration, balance.name, scale=scale * torch.linspace(1, 2, 16))
        with pytest.raises(
            ptq.PTQError, match="expected one scale for channels that are added to each other, got several"
        ):
            ptq.load_calibration(prepared, wrong)


def test_talking_heads_have_no_rows_that_sum_to_one():
    images = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    prepared = ptq.prepare_fx(trained_like(TalkingHeads()), BALANCED, images[:1])
    assert not [b for b in plan_of(prepared).balances if b.kind == "value" and b.shifts]
    assert max(differences(prepared, images)) < 1e-5


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=9), st.floats(0, 1), st.booleans())
def test_balanced_ranges_are_the_formula(pairs, exponent, shifts):
    low, high = (np.array(ends, dtype=np.float64) for ends in zip(*(sorted(pair) for pair in pairs), strict=True))
    shift = (low + high) / 2 if shifts else np.zeros_like(low)
    width = 2 * np.maximum(high - shift, shift - low)
    relative = np.maximum(width / width.mean(), LEAST_RANGE) if width.mean() > 0 else np.ones_like(width)
    found = balanced_ranges(torch.from_numpy(low), torch.from_numpy(high), exponent, shifts=shifts)
    np.testing.assert_allclose(found.scale, relative**exponent, rtol=1e-6)
    np.testing.assert_allclose(found.shift, shift, rtol=1e-6, atol=1e-30)


def test_queries_and_keys_meet_in_the_middle():
    query, low, high = torch.tensor([1.0, 4.0, 1.0]), torch.tensor([-4.0, -1.0, 0.0]), torch.tensor([4.0, 1.0, 2.0])
    found = matched_ranges(query, low, high, 1.0, shifts=True)
    widths = torch.stack([query * found.scale, (high - low) / 2 / found.scale])
    torch.testing.assert_close(widths[0] / widths[1], torch.full((3,), float(widths[0, 0] / widths[1, 0])))
    assert found.shift.tolist() == [0.0, 0.0, 1.0]
    assert float(found.scale.log().sum()) == pytest.approx(0.0, abs=1e-6)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_extremes_are_those_of_all_batches_together(rows, kept, seed):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    extremes = Extremes(kept)
    for part in x.split(7):
        extremes.add(part)
    ordered = x.sort(0).values
    low, high = extremes.ends()
    assert torch.equal(low, ordered[min(kept, rows) - 1])
    assert torch.equal(high, ordered[-min(kept, rows)])


def test_the_range_leaves_out_single_outliers():
    assert 1 + int(OUTSIDE * 1999) == 1
    assert 1 + int(OUTSIDE * 2000) == 2


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return family("vit_tiny_patch16_224", **SMALL)


@pytest.fixture(scope="module")
def calibrated(model):
    prepared = ptq.prepare_fx(model, BALANCED, images_of(32, 1))
    return prepared, ptq.calibrate(prepared, images_of(32, 6).split(4), progress=False)


def test_the_prepared_model_stays_what_it_is(model, calibrated):
    prepared, calibration = calibrated
    fresh = ptq.prepare_fx(model, BALANCED, images_of(32, 1))
    for (name, own), (other, theirs) in zip(fresh.state_dict().items(), prepared.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(own, theirs)
    again = ptq.calibrate(prepared, images_of(32, 6).split(4), progress=False)
    assert again.fingerprint() == calibration.fingerprint()


def test_a_quantized_product_loses_less_behind_balanced_channels(model):
    """One channel of the norm a hundred times the others: at 4 bits nothing else has a code."""
    spiky = copy.deepcopy(model)
    with torch.no_grad():
        spiky.blocks[0].norm1.weight[0] *= 100
        spiky.blocks[0].attn.qkv.weight[:, 0] /= 100
    recipe = ptq.recipes.ptq4vit(4, 4).with_search(n=20, rounds=1)
    found = {}
    for name, mapping in {"as it is": recipe, "balanced": recipe.with_transforms(norms=1.0)}.items():
        prepared = ptq.prepare_fx(spiky, mapping, images_of(32, 1))
        found[name] = ptq.calibrate(prepared, images_of(32, 6), progress=False).snr["blocks.0.attn.qkv"]
    assert found["balanced"] > found["as it is"] + 6  # dB


@pytest.mark.parametrize("target", ["onnxruntime", "generic", "openvino"])
def test_the_file_computes_the_simulation(calibrated, tmp_path, target):
    prepared, _ = calibrated
    converted = ptq.convert_fx(prepared)
    ptq.export_onnx(converted, tmp_path / "a.onnx", images_of(32, 1), target=target)
    report = ptq.verify_onnx(tmp_path / "a.onnx", converted, images_of(32))
    assert report.same_functions.bit_equal == 1.0


def test_a_file_carries_them_and_a_resumed_calibration_too(model, calibrated, tmp_path):
    prepared, calibration = calibrated
    calibration.save(tmp_path / "a.safetensors")
    loaded = ptq.Calibration.load(tmp_path / "a.safetensors")
    assert loaded.fingerprint() == calibration.fingerprint()
    fresh = ptq.load_calibration(ptq.prepare_fx(model, BALANCED, images_of(32, 1)), loaded)
    x = images_of(32)
    with torch.no_grad():
        assert torch.equal(ptq.convert_fx(fresh)(x), ptq.convert_fx(prepared)(x))
    first, *_ = plan_of(prepared).ops
    part = ptq.Calibration(
        calibration.plan,
        {key: value for key, value in calibration.params.items() if key.startswith(first.name)},
        {first.name: calibration.distances[first.name]},
        provenance=calibration.provenance,
        balances=calibration.balances,
    )
    part.save(tmp_path / "b.safetensors")
    resumed = ptq.calibrate(
        ptq.prepare_fx(model, BALANCED, images_of(32, 1)),
        images_of(32, 6).split(4),
        progress=False,
        checkpoint=tmp_path / "b.safetensors",
    )
    assert resumed.fingerprint() == calibration.fingerprint()


@pytest.mark.parametrize("how", ["copied", "through a file"])
def test_a_prepared_model_keeps_its_places(model, calibrated, how):
    (prepared, _), images = calibrated, images_of(32, 2)
    if how == "copied":
        again = copy.deepcopy(prepared)
    else:
        torch.save(prepared, file := io.BytesIO())
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(ptq.convert_fx(again)(images), ptq.convert_fx(prepared)(images))
    assert not torch.equal(ptq.convert_fx(again)(images), model(images))


def test_sequential_and_in_groups(model, calibrated):
    _, calibration = calibrated
    prepared = ptq.prepare_fx(model, BALANCED, images_of(32, 1))
    small = ptq.calibrate(prepared, images_of(32, 6).split(4), progress=False, memory_limit=300 << 20)
    assert small.fingerprint() == calibration.fingerprint()
    in_turn = ptq.calibrate(prepared, images_of(32, 6).split(4), progress=False, sequential=True)
    assert in_turn.balances.keys() == calibration.balances.keys()


def with_number(calibration, name, **changes):
    own = calibration.balances[name]
    tensors = {"scale": own.scale, "shift": own.shift} | changes
    balances = calibration.balances | {name: ChannelAffine(**tensors)}
    return ptq.Calibration(calibration.plan, calibration.params, balances=balances)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": torch.zeros(48)}, "balance_scale: expected scales from 2^-40 to 2^40"),
        ({"scale": torch.ones(47)}, "expected finite float32 numbers of shape (48,), got torch.float32, shape (47,)"),
        ({"scale": torch.ones(48, dtype=torch.float64)}, "got torch.float64"),
        ({"shift": torch.full((48,), torch.nan)}, "not finite"),
    ],
)
def test_numbers_that_no_calibration_gives_are_refused(calibrated, tmp_path, changes, said):
    prepared, calibration = calibrated
    wrong = with_number(calibration, "blocks.0.attn.qkv:lhs", **changes)
    for refused in (lambda: wrong.save(tmp_path / "a.safetensors"), lambda: ptq.load_calibration(prepared, wrong)):
        with pytest.raises(ptq.PTQError) as caught:
            refused()
        assert said in str(caught.value)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_calibration_of_other_transforms_is_refused(model, calibrated):
    _, calibration = calibrated
    prepared = ptq.prepare_fx(model, QUICK, images_of(32, 1))
    with pytest.raises(ptq.PTQError, match=r"transforms: expected 0 balances.*got 5 balances"):
        ptq.load_calibration(prepared, calibration)


def test_constant_channels_and_one_token():
    class OneToken(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.norm, self.head = nn.Linear(48, 16), nn.LayerNorm(16), nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.norm(self.stem(x.flatten(1))))

    model = OneToken().eval()
    with torch.no_grad():
        model.norm.weight[:3] = 0.0
    images = torch.randn(5, 3, 4, 4)
    prepared = ptq.prepare_fx(model, BALANCED, images[:1])
    calibration = ptq.calibrate(prepared, images, progress=False)
    scale = calibration.balances["head:lhs"].scale
    assert bool((scale > 0).all())
    assert max(differences(prepared, images)) < 1e-5
    balanced = apply_balances(sharing_tensors(prepared), calibration.balances)
    with torch.no_grad():
        torch.testing.assert_close(balanced(images), model(images), rtol=1e-4, atol=1e-5)
