"""Rotating the residual stream: R by its oracle, streams that turn or say why not, the same values and names."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import QUICK, model_of, two_blocks
from timm.layers import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.behaviour import distance, tensors_of
from ptq4vit_fx.passes.graph.contract import history
from ptq4vit_fx.passes.graph.rotations import ordered_sum, rotation
from ptq4vit_fx.plan import Transformed
from ptq4vit_fx.tools.families import find_family

WIDTH = 12
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROTATED = ptq.recipes.ptq4vit().with_transforms(rotation=0)


def drawn(model):
    """Let no weight of a norm be one, no bias zero: what is left out then shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def matrix(width, seed=0):
    return rotation(width, seed).turn(torch.eye(width), -1)


def places_of(model, x=X, mapping=ROTATED, **prepare: Any):
    """Return what rotation notes, once the rotated model computes the same, keeps all names, and left the user's."""
    before = copy.deepcopy(model.state_dict())
    plain = ptq.prepare_fx(model, ptq.recipes.ptq4vit(), x, **prepare)
    prepared = ptq.prepare_fx(model, mapping, x, **prepare)
    for rows in (2, 5):
        images = torch.randn(rows, *x.shape[1:], generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            assert distance(tensors_of(prepared(images)), tensors_of(model(images))) < 1e-5
    assert [op.name for op in prepared.plan.ops] == [op.name for op in plain.plan.ops]
    assert prepared.plan.quantizers == plain.plan.quantizers
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return prepared.plan.transformed


@pytest.mark.parametrize("width", [2, 3, 8, 12, 31, 37, 64, 96, 192, 384, 768, 1024, 1408])
def test_r_is_orthogonal_and_keeps_the_mean(width):
    r = matrix(width)
    torch.testing.assert_close(r @ r.T, torch.eye(width).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(r.sum(0), torch.ones(width).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(r.sum(1), torch.ones(width).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("width", "largest"), [(64, 1.0), (1024, 1.0), (192, 1.2), (768, 1.2), (384, 1.7), (512, 2.2)])
def test_r_spreads_every_channel_over_all_others(width, largest):
    """Entries of a dense random R reach 4 or 5 of 1 / sqrt(width)."""
    sizes = matrix(width).abs() * width**0.5
    assert sizes.min() > 0.2
    assert sizes.max() <= largest


def test_r_of_any_other_width_mixes_too():
    sizes = matrix(37).abs() * 37**0.5
    assert sizes.max() < 4
    assert (sizes > 1e-9).double().mean() > 0.9


def test_the_seed_decides_r():
    assert torch.equal(matrix(96, 3), matrix(96, 3))
    assert not torch.equal(matrix(96, 3), matrix(96, 4))


def test_blocks_turn_each_alone_and_along_any_dimension():
    x, r = torch.randn(2, 24, 5), matrix(8)
    turned = rotation(8, 0).turn(x, 1, blocks=3)
    expected = torch.einsum("bnct,cd->bndt", x.double().unflatten(1, (3, 8)), r).flatten(1, 2)
    torch.testing.assert_close(turned, expected)


def test_sums_are_those_of_no_machine():
    x = torch.randn(3, 385, dtype=torch.float64)
    torch.testing.assert_close(ordered_sum(x), x.sum(-1))
    assert torch.equal(ordered_sum(x), torch.stack([ordered_sum(row[None])[0] for row in x]))


def test_two_blocks_turn_and_say_so():
    assert places_of(drawn(two_blocks())) == (
        Transformed(
            *("rotation", "blocks.0.norm1", True),
            "8 channels, which 5 products and 1 stored values write and 5 products read",
        ),
    )


def test_a_recipe_that_does_not_ask_has_no_pass_and_no_notes():
    plain = ptq.prepare_fx(two_blocks(), ptq.recipes.ptq4vit(), X)
    assert plain.plan.transformed == ()
    assert "rotate_residual" not in [rewrite.name for rewrite in history(plain)]


def test_outliers_are_spread():
    model = drawn(two_blocks())
    with torch.no_grad():
        model.blocks[0].norm1.weight[3] = 40.0
    prepared = ptq.prepare_fx(model, ROTATED, X)
    (norm,) = (node for node in prepared.graph.nodes if node.name == "layer_norm")
    assert norm.kwargs["weight"] is None
    assert norm.kwargs["bias"] is None
    columns = prepared.get_parameter("blocks.0.qkv.weight").norm(dim=0)
    before = (model.blocks[0].qkv.weight * model.blocks[0].norm1.weight).norm(dim=0)
    assert before.max() / before.mean() > 5
    assert columns.max() / columns.mean() < 3


def test_seeds_and_threads():
    def weights(seed, threads):
        torch.set_num_threads(threads)
        mapping = ptq.recipes.ptq4vit().with_transforms(rotation=seed)
        state = ptq.prepare_fx(model, mapping, torch.randn(1, 3, 32, 32)).state_dict()
        return torch.cat([value.flatten() for value in state.values()])

    threads = torch.get_num_threads()
    model = drawn(VisionTransformer(img_size=32, patch_size=16, embed_dim=192, depth=1, num_heads=3))
    try:
        assert torch.equal(weights(0, 1), weights(0, 2))
        assert not torch.equal(weights(0, 1), weights(1, 1))
    finally:
        torch.set_num_threads(threads)


def parts(**more):
    """The modules of a small model: patches, two norms, a branch and a head."""
    common = {
        "patches": nn.Conv2d(3, WIDTH, 2, 2),
        **{f"norm{i}": nn.LayerNorm(WIDTH) for i in (1, 2, 3)},
        **{"fc1": nn.Linear(WIDTH, 20), "fc2": nn.Linear(20, WIDTH), "head": nn.Linear(WIDTH, 4)},
    }
    return common | more


def tokens(m, x):
    return m.patches(x).flatten(2).transpose(1, 2)


def branch(m, x):
    return m.fc2(F.gelu(m.fc1(x)))


def end(m, x):
    return m.head(m.norm2(x).mean(1))


def plain(m, x):
    t = tokens(m, x)
    return end(m, t + branch(m, m.norm1(t)))


def layer_scale(m, x):
    t = tokens(m, x)
    return end(m, t + (m.scale * branch(m, m.norm1(t)).unflatten(1, (4, 4))).flatten(1, 2))


def registers(m, x):
    t = torch.cat([m.registers.expand(len(x), -1, -1), tokens(m, x)], 1) + m.position
    return end(m, t + branch(m, m.norm1(t)))


def shared_branch(m, x):
    t = tokens(m, x)
    for _ in range(3):
        t = t + branch(m, m.norm1(t))
    return end(m, t)


def windows(m, x):
    t = tokens(m, x).unflatten(1, (4, 4))
    rolled = F.pad(m.norm1(t).roll((1, 1), (1, 2)), (0, 0, 0, 0, 0, 0))
    inside = rolled.reshape(-1, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, WIDTH)
    back = branch(m, inside).reshape(-1, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, WIDTH)
    return end(m, (t + back.roll((-1, -1), (1, 2))).flatten(1, 2))


def merging(m, x):
    t = tokens(m, x)
    t = (t + branch(m, m.norm1(t))).unflatten(1, (4, 4))
    t = torch.cat([t[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
    return m.head(m.norm4(t).mean((1, 2)))


def written_out(m, x):
    t = 0.5 * tokens(m, x) + 2.0
    centred = t - t.mean(-1, keepdim=True)
    t = t + branch(m, centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6))
    return end(m, t)


def convolution_reads(m, x):
    t = tokens(m, x)
    image = m.norm1(t).transpose(1, 2).unflatten(2, (4, 4))
    t = t + m.reduce(image).flatten(2).transpose(1, 2).repeat_interleave(4, 1)
    return end(m, t + branch(m, m.norm3(t)))


def position_read_twice(m, x):
    t = tokens(m, x) + m.position
    return end(m, t + branch(m, m.norm1(t))) + m.position.mean()


FIRE: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (plain, {}),
    "layer scale": (layer_scale, {"scale": nn.Parameter(torch.rand(WIDTH))}),
    "registers": (
        registers,
        {"registers": nn.Parameter(torch.randn(1, 3, WIDTH)), "position": nn.Parameter(torch.randn(19, WIDTH))},
    ),
    "no biases": (plain, {"fc1": nn.Linear(WIDTH, 20, bias=False), "fc2": nn.Linear(20, WIDTH, bias=False)}),
    "norm without weights": (plain, {"norm1": nn.LayerNorm(WIDTH, elementwise_affine=False)}),
    "norm without bias": (plain, {"norm1": nn.LayerNorm(WIDTH, bias=False)}),
    "rms norm": (plain, {f"norm{i}": nn.RMSNorm(WIDTH) for i in (1, 2)}),
    "rms norm written out": (plain, {f"norm{i}": RmsNorm(WIDTH) for i in (1, 2)}),
    "norm written out": (written_out, {}),
    "a branch called three times": (shared_branch, {}),
    "windows": (windows, {}),
    "merging": (merging, {"norm4": nn.LayerNorm(4 * WIDTH), "head": nn.Linear(4 * WIDTH, 4)}),
    "convolution": (convolution_reads, {"reduce": nn.Conv2d(WIDTH, WIDTH, 2, 2)}),
    "a constant that others read": (position_read_twice, {"position": nn.Parameter(torch.randn(16, WIDTH))}),
}


@pytest.mark.parametrize("name", FIRE)
def test_streams_that_turn(name):
    function, more = FIRE[name]
    places = places_of(drawn(model_of(function, **parts(**more))))
    assert [place.done for place in places] == [True], places


def returned(m, x):
    t = tokens(m, x)
    t = t + branch(m, m.norm1(t))
    return end(m, t), t


def activated(m, x):
    t = tokens(m, x)
    return end(m, F.silu(t) + branch(m, m.norm1(t)))


def depthwise(m, x):
    t = tokens(m, x)
    t = t + m.depthwise(t.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
    return end(m, t + branch(m, m.norm1(t)))


def post_norm(m, x):
    t = tokens(m, x)
    t = t + m.norm1(branch(m, t))
    return end(m, t)


def norm_joins(m, x):
    t = m.norm3(tokens(m, x))
    return end(m, t + branch(m, m.norm1(t)))


def scaled_stream(m, x):
    t = tokens(m, x)
    return end(m, t * m.scale + branch(m, m.norm1(t)))


def padded(m, x):
    t = tokens(m, x)
    return end(m, t + branch(m, F.pad(m.norm1(t), (0, 0, 0, 2)))[:, :16])


def mixed_tokens(m, x):
    t = tokens(m, x)
    t = t + m.mix(m.norm1(t).transpose(1, 2)).transpose(1, 2)
    return end(m, t + branch(m, m.norm3(t)))


def similar(m, x):
    t = tokens(m, x)
    t = t + (t @ t.transpose(1, 2)).softmax(-1) @ m.fc2(m.fc1(m.norm1(t)))
    return end(m, t)


def scrambled(m, x):
    t = tokens(m, x)
    t = t + branch(m, m.norm1(t))
    return end(m, t.transpose(1, 2).reshape(t.shape))


def tied(m, x):
    t = tokens(m, x)
    return end(m, t + branch(m, m.norm1(t))) + m.head(x.flatten(2).mean(-1).repeat(1, WIDTH // 3))


def two_readers_of_one_weight(m, x):
    t = tokens(m, x)
    t = t + m.fc2(F.gelu(m.fc1(m.norm1(t)) + m.fc1(m.norm3(t))))
    return end(m, t)


def halves(m, x):
    t = tokens(m, x)
    t = t + branch(m, m.norm1(t))
    return end(m, torch.cat([t[..., :6], t[..., 6:].abs()], -1))


def diagonal(m, x):
    t = tokens(m, x)
    t = t + branch(m, m.norm1(t))
    return m.head(m.norm2(t[:, list(range(WIDTH)), list(range(WIDTH))]))


REFUSE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "returned": (returned, {}, "the model returns the stream"),
    "activated": (activated, {}, "silu computes the stream"),
    "depthwise": (
        depthwise,
        {"depthwise": nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)},
        "depthwise is a convolution in groups of channels",
    ),
    "post-norm": (post_norm, {}, "norm1 has weights, and its output joins the stream"),
    "a norm begins it": (norm_joins, {}, "norm3 has weights, and its output joins the stream"),
    "scaled": (
        scaled_stream,
        {"scale": nn.Parameter(torch.rand(WIDTH))},
        "mul multiplies channels, and not behind a product that can take the factors",
    ),
    "padded": (padded, {}, "pad changes what norm1 adds"),
    "tokens mixed": (mixed_tokens, {"mix": nn.Linear(16, 16)}, "mix reads the stream"),
    "a product of activations": (similar, {}, "matmul reads the stream"),
    "scrambled": (scrambled, {}, "reshape does not keep its channels together"),
    "a weight that others read": (tied, {}, "head shares its weight with head"),
    "one weight behind two norms": (two_readers_of_one_weight, {}, "fc1 shares its weight with fc1"),
    "channels of different tokens": (diagonal, {}, "getitem does not keep its channels together"),
    "channels apart": (halves, {}, "getitem does not keep its channels together"),
}


@pytest.mark.parametrize("name", REFUSE)
def test_streams_that_do_not_turn_say_why(name):
    function, more, reason = REFUSE[name]
    places = places_of(drawn(model_of(function, **parts(**more))))
    assert [place.done for place in places][:1] == [False]
    assert places[0].note == reason


def test_a_closed_module_is_no_reader():
    model = drawn(two_blocks())
    (place,) = places_of(model, leaf_modules=["blocks.1"])
    assert (place.done, place.note) == (False, "blocks.1 reads the stream")


def test_a_model_without_norms_says_so():
    model = drawn(model_of(lambda m, x: m.head(tokens(m, x).mean(1)), **parts()))
    assert places_of(model) == (
        Transformed("rotation", "model", done=False, note="no residual stream with normalizations"),
    )


small = partial(VisionTransformer, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)


@pytest.mark.parametrize("block", [ParallelScalingBlock, ParallelThingsBlock])
def test_parallel_blocks(block):
    (place,) = places_of(drawn(small(block_fn=block)), torch.randn(1, 3, 16, 16))
    assert place.done


@pytest.mark.parametrize("target", ["onnxruntime", "generic", "openvino"])
def test_a_rotated_model_is_deployed_bit_for_bit(tmp_path, small_vit, small_images, target):
    prepared = ptq.prepare_fx(small_vit, ROTATED.with_search(**QUICK), small_images[:1])
    calibration = ptq.calibrate(prepared, small_images, progress=False)
    calibration.save(tmp_path / "scales.safetensors")
    again = ptq.prepare_fx(copy.deepcopy(small_vit), ROTATED.with_search(**QUICK), small_images[:1])
    ptq.load_calibration(again, ptq.Calibration.load(tmp_path / "scales.safetensors"))
    converted = ptq.convert_fx(again)
    assert converted.plan.transformed[0].done
    ptq.export_onnx(converted, tmp_path / "model.onnx", small_images[:1], target=target)
    report = ptq.verify_onnx(tmp_path / "model.onnx", converted, small_images, layers=0)
    assert report.same_functions.bit_equal == 1.0


def test_a_calibration_of_another_rotation_is_refused(small_vit, small_images):
    mapping = ptq.recipes.ptq4vit().with_search(**QUICK)
    plain, rotated, other = (
        ptq.prepare_fx(small_vit, m, small_images[:1])
        for m in (mapping, mapping.with_transforms(rotation=0), mapping.with_transforms(rotation=1))
    )
    calibration = ptq.calibrate(rotated, small_images, progress=False)
    for prepared in (plain, other):
        with pytest.raises(ptq.PTQError, match=r"expected 0 balances, Transforms\(rotation=(None|1)"):
            ptq.load_calibration(prepared, calibration)


#: Family -> for each of its streams, "" if it turns, or the reason.
STARTS = "has weights, and its output joins the stream"
FAMILIES = {
    "vit": [""],
    "deit_distilled": [""],
    "dinov2": [""],
    "cait": [""],
    "swin": [f"patch_embed.norm {STARTS}", ""],
    "swinv2": [f"layers.1.downsample.norm {STARTS}"],
    "levit": ["no residual stream with normalizations"],
    "vit_clip": ["blocks.0.norm1 reads norm_pre, whose weights it cannot take", f"norm_pre {STARTS}"],
}
MORE_FAMILIES = {
    "vit_relpos": [""],
    "deit3": [""],
    "dinov3": [""],
    "siglip": ["", ""],
    "vit_hybrid": [""],
    "eva02": [""],
    "beit": [""],
    "samvit": ["pad in blocks.0 changes what blocks.0.norm1 adds"],
    "swinv2_cr": [f"stages.1.blocks.0.norm1 {STARTS}"],
    "xcit": ["patch_embed.proj.6.1 computes the stream"],
    "pit": [f"transformers.{n}.pool.conv is a convolution in groups of channels" for n in (1, 1, 2)],
    "convit": [""],
    "naflexvit": [""],
    "torchvision_vit": [""],
    "torchvision_swin": [f"features.0.2 {STARTS}", ""],
    "hf_vit": [""],
    "hf_dinov2": [""],
    "hf_swin": [f"swin.embeddings.norm {STARTS}", ""],
    "hf_beit": [""],
    "volo": ["network.0.0.attn.pool reads network.0.0.norm1, whose weights it cannot take", ""],
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [*FAMILIES.items(), *(pytest.param(*item, marks=pytest.mark.sweep) for item in MORE_FAMILIES.items())],
)
def test_families(name, expected):
    family = find_family(name)
    places = places_of(drawn(family.create()), torch.randn(2, 3, family.image, family.image))
    assert ["" if place.done else place.note for place in places] == expected
