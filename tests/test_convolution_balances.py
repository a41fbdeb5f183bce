"""Channels of convolutions: scaled where one layer writes them, back where the next reads them; the function stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models import mobilevit
from timm.models.byobnet import ByobNet, ByoModelCfg
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.balances import LEAST_RANGE, ChannelAffine, shrunk_ranges
from ptq4vit_fx.passes.apply_balances import apply_balances
from ptq4vit_fx.passes.graph.channels import Groups
from ptq4vit_fx.passes.graph.contract import history, plan_of, sharing_tensors
from ptq4vit_fx.tools.families import find_family

QUICK = ptq.recipes.ptq4vit().with_search(n=8, rounds=1)
BALANCED = QUICK.with_transforms(convolutions=1.0)
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained_like(model: nn.Module) -> nn.Module:
    """Return the model with norms and statistics as training leaves them: all channels differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if x.ndim == 1:
                spread = torch.randn(x.shape, generator=generator) * 0.5
                x.mul_(spread.exp()) if name.endswith(("weight", "var")) else x.add_(spread)
    return model.eval()


def noted(prepared) -> list[str]:
    return [f"{t.name}: {'' if t.done else 'no, '}{t.note}" for t in plan_of(prepared).transformed]


def differences(prepared, images) -> list[float]:
    """Return by how much numbers that nobody would measure change the outputs, relative, on two sizes of batch."""
    generator = torch.Generator().manual_seed(3)
    numbers = {
        b.name: ChannelAffine(torch.randn(b.channels, generator=generator).mul(0.7).exp(), torch.zeros(b.channels))
        for b in plan_of(prepared).balances
    }
    balanced = apply_balances(sharing_tensors(prepared), numbers)
    with torch.no_grad():
        pairs = [(prepared(batch), balanced(batch)) for batch in (images, images[:2])]
    return [float((ours - own).norm() / own.norm()) for own, ours in pairs]


class Net(nn.Module):
    """Two convolutions and a head, with a way to do something else between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm: nn.Module = nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.more()

    def more(self):
        pass

    def forward(self, x):
        x = self.second(self.between(self.norm(self.stem(x))))
        return self.head(self.behind(x))

    def between(self, x):
        return x.relu()

    def behind(self, x):
        return F.gelu(x).mean((2, 3))


class Depthwise(Net):
    def more(self):
        self.second = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.head = nn.Linear(16, 5)


class Grouped(Net):
    def more(self):
        self.second = nn.Conv2d(8, 12, 3, padding="same", groups=4, bias=False)
        self.head = nn.Linear(12, 5)


class NoBatchNorm(Net):
    def more(self):
        self.norm = nn.Identity()


class NormWithoutWeights(Net):
    def more(self):
        self.norm = nn.BatchNorm2d(8, affine=False)


class BatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class FunctionalNorm(Net):
    def more(self):
        self.norm = BatchNorm(8)


class GroupNorm(Net):
    def more(self):
        self.norm = nn.GroupNorm(2, 8)


class LeakyPooledPadded(Net):
    def between(self, x):
        x = F.avg_pool2d(F.leaky_relu(F.pad(x, (1, 1, 0, 2)), 0.2), 2, 1, 1)
        return F.max_pool2d(x, 2) * 0.5


class ToTheHead(Net):
    """A pool and the head read the second convolution."""

    def behind(self, x):
        return F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)


class Residual(Net):
    """What two layers add is read by two convolutions."""

    def more(self):
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def between(self, x):
        return x + self.block(x)


class Concatenated(Net):
    """Half of what the second convolution reads comes out of SiLU."""

    def more(self):
        self.second, self.other = nn.Conv2d(16, 8, 1), nn.Conv2d(3, 8, 3, 2, 1)

    def forward(self, x):
        x = torch.cat([self.norm(self.stem(x)).relu(), self.activated(self.other(x))], 1)
        return self.head(self.behind(self.second(x)))

    def activated(self, x):
        return F.silu(x)


class BothHalves(Concatenated):
    def activated(self, x):
        return F.leaky_relu(x)


class Shuffled(Net):
    """Channels in another order, by a reshape."""

    def between(self, x):
        return x.relu().unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


class ChannelsLast(Net):
    def between(self, x):
        return x.permute(0, 2, 3, 1).relu().contiguous().permute(0, 3, 1, 2)


class Gated(Net):
    """Squeeze and excitation: the gate is what it was."""

    def more(self):
        self.gate = nn.Conv2d(8, 8, 1)

    def between(self, x):
        x = x.relu()
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class Tokens(Net):
    """A LayerNorm writes what a convolution reads."""

    def more(self):
        self.last = nn.LayerNorm(8)

    def between(self, x):
        return self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ReadTwice(Net):
    def more(self):
        self.beside = nn.Conv2d(8, 8, 1)

    def between(self, x):
        self.seen = self.beside(x.relu())
        return x.relu()

    def behind(self, x):
        return F.gelu(x + self.seen).mean((2, 3))


class SharedConvolution(Net):
    """One module called three times, each time beside other numbers."""

    def between(self, x):
        return self.second(self.second(x.relu()).relu()).relu()


class SharedNorm(Net):
    def more(self):
        self.between_conv = nn.Conv2d(8, 8, 1)

    def between(self, x):
        return self.norm(self.between_conv(x.relu())).relu()


class Silu(Net):
    def between(self, x):
        return F.silu(x)


class Relu6(Net):
    def between(self, x):
        return F.relu6(x)


class PaddedWithOnes(Net):
    def between(self, x):
        return F.pad(x.relu(), (1, 1, 1, 1), value=1.0)


class ShiftedBehind(Net):
    def between(self, x):
        return x.relu() + 1


class Squared(Net):
    def between(self, x):
        return x * x


class Returned(Net):
    def forward(self, x):
        x = self.between(self.norm(self.stem(x)))
        return self.head(self.behind(self.second(x))), x


class BatchStatistics(Net):
    def more(self):
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


STEM, OTHER = (f"{name}: no, it reads an input of the model" for name in ("stem", "other"))
ALL = "second: 8 channels scaled"

FIRES = [
    (Net, [STEM, ALL]),
    (Depthwise, [STEM, ALL]),
    (Grouped, [STEM, ALL]),
    (NoBatchNorm, [STEM, ALL]),
    (NormWithoutWeights, [STEM, ALL]),
    (FunctionalNorm, [STEM, ALL]),
    (GroupNorm, [STEM, ALL]),
    (LeakyPooledPadded, [STEM, ALL]),
    (ToTheHead, [STEM, ALL, "head: 8 channels scaled"]),
    (Residual, [STEM, "block.0: 8 channels scaled"]),
    (Concatenated, [STEM, OTHER, ALL]),
    (BothHalves, [STEM, OTHER, "second: 16 channels scaled"]),
    (Shuffled, [STEM, ALL]),
    (ChannelsLast, [STEM, ALL]),
    (Gated, [STEM, "gate: 8 channels scaled"]),
    (Tokens, [STEM, ALL]),
    (ReadTwice, [STEM, "beside: 8 channels scaled"]),
    (SharedConvolution, [STEM, ALL, "second_1: 8 channels scaled", "second_2: 8 channels scaled"]),
    (SharedNorm, [STEM, "between_conv: 8 channels scaled", ALL]),
    (Silu, [STEM, "second: no, it reads silu"]),
    (Relu6, [STEM, "second: no, it reads relu6"]),
    (PaddedWithOnes, [STEM, "second: no, it reads pad"]),
    (ShiftedBehind, [STEM, "second: no, add adds something else to it"]),
    (Squared, [STEM, "second: no, it reads mul"]),
    (BatchStatistics, [STEM, "second: no, it reads norm"]),
]


@pytest.mark.filterwarnings("ignore::ptq4vit_fx.PTQWarning")
@pytest.mark.parametrize(("kind", "expected"), FIRES, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_it_fires_where_it_is_exact_and_says_why_not_elsewhere(kind, expected):
    prepared = ptq.prepare_fx(trained_like(kind()), BALANCED, IMAGES[:1])
    assert noted(prepared) == expected
    assert max(differences(prepared, IMAGES)) < 1e-5


class BatchNormInFront(Net):
    """Behind ReLU: nothing takes it."""

    def between(self, x):
        return self.last(x.relu())

    def more(self):
        self.last = nn.BatchNorm2d(8)


class StemReadTwice(Net):
    def forward(self, x):
        x = self.stem(x)
        return self.head(self.behind(self.second(self.norm(x).relu()) + x[:, :, :8, :8]))


@pytest.mark.parametrize(
    ("kind", "folded", "left"),
    [
        (Net, 1, 0),
        (NormWithoutWeights, 1, 0),
        (FunctionalNorm, 1, 0),
        (Residual, 2, 0),
        (NoBatchNorm, 0, 0),
        (GroupNorm, 0, 0),
        (BatchNormInFront, 1, 1),
        (StemReadTwice, 0, 1),
        (SharedNorm, 2, 0),
        (BatchStatistics, 0, 1),
    ],
)
def test_batch_norms_go_into_the_convolutions_in_front(kind, folded, left):
    model = trained_like(kind())
    prepared = ptq.prepare_fx(model, BALANCED, IMAGES[:1])
    assert {rewrite.name: rewrite.count for rewrite in history(prepared)}["fold_batch_norms"] == folded
    modules = [type(prepared.get_submodule(n.target)) for n in prepared.graph.nodes if n.op == "call_module"]
    calls = [n for n in prepared.graph.nodes if n.target is F.batch_norm]
    assert modules.count(nn.BatchNorm2d) + len(calls) == left
    with torch.no_grad():
        for batch in (IMAGES, IMAGES[:2]):
            torch.testing.assert_close(prepared(batch), model(batch), rtol=1e-5, atol=1e-5)
    assert "fold_batch_norms" not in [r.name for r in history(ptq.prepare_fx(model, QUICK, IMAGES[:1]))]


class SiluDepthwise(Depthwise):
    def between(self, x):
        return F.silu(x)


class DepthwiseOfTheImage(Net):
    def more(self):
        self.stem = nn.Conv2d(3, 8, 3, groups=1)
        self.image = nn.Conv2d(3, 3, 3, padding=1, groups=3)

    def forward(self, x):
        return super().forward(self.image(x))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (SiluDepthwise, ["stem: no, it reads an input of the model", "second: no, it reads silu", ALL]),
        (Depthwise, [STEM, ALL]),
        (Grouped, [STEM, ALL]),
        (DepthwiseOfTheImage, ["image: no, it reads an input of the model", "stem: 3 channels scaled", ALL]),
    ],
)
def test_in_front_of_a_depthwise_convolution(kind, expected):
    both = BALANCED.with_transforms(depthwise=1.0)
    prepared = ptq.prepare_fx(trained_like(kind()), both, IMAGES[:1])
    assert list(dict.fromkeys(noted(prepared))) == expected
    assert max(differences(prepared, IMAGES)) < 1e-5


def test_a_group_of_several_channels_is_left_alone():
    prepared = ptq.prepare_fx(trained_like(Grouped()), QUICK.with_transforms(depthwise=1.0), IMAGES[:1])
    assert noted(prepared) == ["second: no, it has several channels in a group"]


@pytest.mark.parametrize("minimum", [0.0, 0.2785])
def test_only_wide_channels_shrink_and_the_bound_below_stays(minimum):
    high = torch.tensor([0.0, 0.1, 1.0, 2.0, 40.0])
    low = torch.full((5,), -minimum)
    found = shrunk_ranges(low, high, 1.0, minimum)
    width = (torch.maximum(high, -low) / found.scale).clamp_min(minimum)
    assert float(found.scale.min()) == 1.0
    assert bool((low / found.scale >= -minimum).all())
    assert torch.equal(found.scale, found.scale.sort().values)
    best = width.max()

    def lost(r):
        own = torch.maximum(high, -low).clamp_min(max(minimum, float(high.mean()) * LEAST_RANGE))
        return float(((r + minimum) / own.clamp_max(r)).square().sum())

    assert all(lost(float(best)) <= lost(r) * (1 + 1e-5) for r in high[1:].clamp_min(max(minimum, 0.05)).tolist())


def test_channels_that_are_all_zero_stay():
    found = shrunk_ranges(torch.zeros(3), torch.zeros(3), 1.0, 0.0)
    assert found.scale.tolist() == [1.0, 1.0, 1.0]


def spread(model: nn.Module, by: float = 30.0) -> nn.Module:
    """Return a model one of whose channels behind the first norm is many times the others."""
    with torch.no_grad():
        model.norm.weight[0] *= by  # type: ignore[index]
        model.second.weight[: len(model.second.weight) // 8] /= by  # type: ignore[index,arg-type]
    return model


@pytest.mark.parametrize(("kind", "transform"), [(Depthwise, "convolutions"), (SiluDepthwise, "depthwise")])
def test_a_depthwise_convolution_loses_less(kind, transform):
    model, found = spread(trained_like(kind())), {}
    recipe = ptq.recipes.ptq4vit(6, 6).with_search(n=20, rounds=1)
    for exponent in (0.0, 1.0):
        prepared = ptq.prepare_fx(model, recipe.with_transforms(**{transform: exponent}), IMAGES[:1])
        found[exponent] = ptq.calibrate(prepared, IMAGES, progress=False).snr["second"]
    assert found[1.0] > found[0.0] + 6  # dB


def hybrid() -> nn.Module:
    """Return a MobileViT of two stages: inverted residuals, attention, SiLU, and one ReLU."""
    torch.manual_seed(0)
    blocks = (
        mobilevit._inverted_residual_block(d=2, c=16, s=1, br=2.0),
        mobilevit._mobilevit_block(d=1, c=16, s=2, transformer_dim=16, transformer_depth=1, patch_size=2, br=2.0),
    )
    settings = {"stem_chs": 8, "stem_type": "3x3", "stem_pool": "", "downsample": "", "num_features": 24}
    return trained_like(ByobNet(ByoModelCfg(blocks, act_layer="silu", **settings), num_classes=5))


STEPS = BALANCED.with_transforms(convolutions=0.5, depthwise=1.0, attention=1.0).with_search(rounding="gram")


@pytest.fixture(scope="module")
def calibrated():
    prepared = ptq.prepare_fx(hybrid(), STEPS, IMAGES[:1])
    return prepared, ptq.calibrate(prepared, IMAGES.split(2), progress=False)


def test_a_hybrid_is_balanced_and_keeps_its_function(calibrated):
    prepared, calibration = calibrated
    kinds = [balance.kind for balance in plan_of(prepared).balances]
    assert kinds.count("depthwise") == 3
    assert kinds.count("convolution") == 3
    assert calibration.balances.keys() == {balance.name for balance in plan_of(prepared).balances}
    assert max(differences(prepared, IMAGES)) < 1e-5


@pytest.mark.parametrize("twins", ["exact", "wide", "uniform"])
def test_best_balances_convolutions_and_gives_them_one_grid_behind_silu(twins):
    plan = ptq.prepare_fx(hybrid(), ptq.recipes.best(8, 6, twins=twins).with_bits("stages.0", a=5), IMAGES[:1]).plan
    found = {op.name: plan.quantizers[f"{op.name}:lhs"] for op in plan.ops if op.kind == "conv2d" and op.lhs_source}
    minimum = {round(quantizer.minimum, 4) for quantizer in found.values()}
    assert minimum == {0.2785}  # of SiLU
    assert all(isinstance(quantizer, ptq.Uniform) and not quantizer.signed for quantizer in found.values())
    assert {quantizer.bits for name, quantizer in found.items() if name.startswith("stages.0")} == {5}
    assert {quantizer.bits for name, quantizer in found.items() if not name.startswith("stages.0")} == {6}
    linears = [plan.quantizers[f"{op.name}:lhs"] for op in plan.ops if op.kind == "linear" and op.lhs_source == "silu"]
    assert {type(quantizer) for quantizer in linears} == {ptq.Uniform if twins == "uniform" else ptq.TwinUniform}
    assert {"convolution", "depthwise"} <= {balance.kind for balance in plan.balances}


def test_the_paper_gives_convolutions_a_twin_behind_silu():
    plan = ptq.prepare_fx(hybrid(), ptq.recipes.ptq4vit(), IMAGES[:1]).plan
    behind = [plan.quantizers[f"{op.name}:lhs"] for op in plan.ops if op.lhs_source == "silu"]
    assert {type(quantizer) for quantizer in behind} == {ptq.TwinUniform}
    assert not plan.balances


@pytest.mark.parametrize("target", ["onnxruntime", "generic", "openvino"])
def test_the_file_computes_the_simulation(calibrated, tmp_path, target):
    prepared, _ = calibrated
    converted = ptq.convert_fx(prepared)
    ptq.export_onnx(converted, tmp_path / "a.onnx", IMAGES[:1], target=target)
    report = ptq.verify_onnx(tmp_path / "a.onnx", converted, IMAGES)
    assert report.same_functions.bit_equal == 1.0


def test_a_calibration_travels(calibrated, tmp_path):
    prepared, calibration = calibrated
    calibration.save(tmp_path / "a.safetensors")
    loaded = ptq.Calibration.load(tmp_path / "a.safetensors")
    assert loaded.fingerprint() == calibration.fingerprint()
    fresh = ptq.load_calibration(ptq.prepare_fx(hybrid(), STEPS, IMAGES[:1]), loaded)
    with torch.no_grad():
        assert torch.equal(ptq.convert_fx(fresh)(IMAGES), ptq.convert_fx(prepared)(IMAGES))


def test_a_convolution_of_patches_may_read_another_one():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 5)).eval()
    prepared = ptq.prepare_fx(model, QUICK, IMAGES[:1])
    ptq.calibrate(prepared, IMAGES, progress=False)
    assert ptq.convert_fx(prepared)(IMAGES).shape == (4, 5)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::ptq4vit_fx.PTQWarning")
@pytest.mark.parametrize(
    "name",
    ["mobilevit", "mobilevitv2", "edgenext", "efficientformerv2", "efficientvit_mit", "fastvit", "repvit", "tiny_vit"],
)
def test_families_keep_their_function(name):
    family = find_family(name)
    images = torch.randn(3, 3, family.image, family.image, generator=torch.Generator().manual_seed(1))
    recipe = BALANCED.with_transforms(depthwise=1.0)
    prepared = ptq.prepare_fx(trained_like(family.create()), recipe, images[:1])
    assert plan_of(prepared).balances
    assert max(differences(prepared, images)) < 1e-4


def test_constant_channels():
    model = trained_like(Residual())
    with torch.no_grad():
        model.norm.weight[:3], model.norm.bias[:3] = 0.0, 0.0  # type: ignore[index,operator]
        model.block[1].weight[:3], model.block[1].bias[:3] = 0.0, 0.0
    prepared = ptq.prepare_fx(model, BALANCED, IMAGES[:1])
    calibration = ptq.calibrate(prepared, IMAGES, progress=False)
    (own,) = calibration.balances.values()
    assert bool((own.scale > 0).all())
    balanced = apply_balances(sharing_tensors(prepared), calibration.balances)
    with torch.no_grad():
        torch.testing.assert_close(balanced(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_groups_join_the_channels_that_meet():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(0, 40, (2, 500), generator=generator, dtype=torch.float64)
    one, other = one[other - one == 3], other[other - one == 3]  # chains of numbers that lie 3 apart
    groups = Groups()
    joined = groups.join(one, other)
    assert all(low < high for low, high in joined)
    meet = {tuple(pair) for pair in torch.stack([one, other], 1).tolist()}
    for number in range(40):
        down = float(number)
        while (down - 3, down) in meet:
            down -= 3
        assert groups.first(float(number)) == down
    assert groups.join(one, other) == []
    assert groups.join(torch.zeros(0), torch.zeros(0)) == []
