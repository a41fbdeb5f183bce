"""Numbers that float32 barely holds: every scale is a normal positive float, and models of such numbers work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import ptq4vit_fx as ptq
from ptq4vit_fx import SearchSettings, TwinUniform, Uniform
from ptq4vit_fx.export.proof.comparison import compare
from ptq4vit_fx.inputs.records import Place
from ptq4vit_fx.plan import QuantOp
from ptq4vit_fx.quantizers import QParams, usable_scale
from ptq4vit_fx.search.products import to_product
from ptq4vit_fx.search.search_op import search_op

LIMITS = torch.finfo(torch.float32)
QUICK = SearchSettings(n=6, rounds=1)
#: Every finite float32: denormals, -0.0, the largest.
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MAGNITUDES = st.sampled_from([0.0, 1e-45, 1e-42, 1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e38, 3.4e38])


def arrays(*shape: int) -> Any:
    """Tensors of any floats, of one magnitude, and constant ones."""
    some = numpy_strategies.arrays(np.float32, shape, elements=FLOATS)
    alike = st.tuples(numpy_strategies.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)), MAGNITUDES)
    constant = FLOATS.map(lambda value: np.full(shape, value, np.float32))
    return st.one_of(some, alike.map(lambda pair: pair[0] * np.float32(pair[1])), constant).map(torch.from_numpy)


def assert_usable(params: QParams, quantizer: Any) -> None:
    """Each is a normal positive float, and what a file of a calibration may hold."""
    quantizer.check(params, Place("test", "parameters"))
    for scale in params.tensors().values():
        assert torch.isfinite(scale).all()
        assert (scale >= LIMITS.tiny).all(), scale


@given(FLOATS.map(abs), st.integers(1, 511))
def test_a_usable_scale_is_normal_and_its_steps_are_finite(value, steps):
    scale = usable_scale(torch.tensor(value, dtype=torch.float32), steps)
    assert scale >= LIMITS.tiny
    assert torch.isfinite(scale * steps)
    assert scale == value or value < LIMITS.tiny or value > LIMITS.max / steps / 4


@given(arrays(5, 7), st.integers(2, 8), st.booleans(), st.sampled_from([0.0, 0.17]))
def test_the_initial_scale_of_any_range_is_usable(x, bits, signed, minimum):
    quantizer = Uniform(bits, signed=signed, minimum=0.0 if signed else minimum)
    scale = quantizer.initial_scale(x.abs().amax())
    params = quantizer.params_from({"scale": scale})
    assert_usable(params, quantizer)
    assert torch.isfinite(quantizer.fake_quantize(x.clone(), params)).all()


@given(FLOATS, st.integers(2, 8), st.booleans())
def test_the_twin_of_any_scale_is_usable(value, bits, wide):
    quantizer = TwinUniform(bits, "gelu", wide=wide)
    assert_usable(quantizer.gelu_params(torch.tensor(value)), quantizer)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_a_search_of_any_operands_chooses_is_usable(data):
    lhs, rhs = data.draw(arrays(4, 6)), data.draw(arrays(3, 6))
    left: Any = data.draw(st.sampled_from([Uniform(8), Uniform(3), TwinUniform(6, "gelu"), Uniform(8, signed=False)]))
    right = Uniform(data.draw(st.integers(2, 8)), granularity=data.draw(st.sampled_from(["tensor", "channel"])))
    chosen = QUICK if data.draw(st.booleans()) else replace(QUICK, screen_rows=None, metric="cosine")
    gradient = data.draw(st.none() | arrays(4, 3).map(torch.square))
    op = QuantOp("fc", "linear", rhs_is_weight=True)
    result = search_op(op, to_product(op, lhs, rhs, None, gradient), left, right, chosen)
    for quantizer, x, params in ((left, lhs, result.lhs), (right, rhs, result.rhs)):
        assert_usable(params, quantizer)
        assert torch.isfinite(quantizer.fake_quantize(x.clone(), params)).all()


@pytest.mark.parametrize(("left", "right"), [(0, 60), (-90, 0), (90, -100), (70, 25), (-60, -60)])
@pytest.mark.parametrize("quantizer", [Uniform(6), TwinUniform(6, "gelu", minimum=0.25)])
def test_a_search_does_not_depend_on_the_magnitude(left, right, quantizer):
    """Operands times powers of two: the same codes, scales times those powers."""
    random = torch.Generator().manual_seed(3)
    lhs, rhs = torch.randn(40, 8, generator=random), torch.randn(5, 8, generator=random)
    lhs = lhs.clamp_min(-0.25) if isinstance(quantizer, TwinUniform) else lhs
    op, channel = QuantOp("fc", "linear", rhs_is_weight=True), Uniform(6, granularity="channel")

    def searched(lhs: Tensor, rhs: Tensor, quantizer: Any) -> Any:
        return search_op(op, to_product(op, lhs, rhs), quantizer, channel, SearchSettings(n=30))

    moved = replace(quantizer, minimum=quantizer.minimum * 2.0**left)
    ordinary, extreme = searched(lhs, rhs, quantizer), searched(lhs * 2.0**left, rhs * 2.0**right, moved)
    for operand, exponent in (("lhs", left), ("rhs", right)):
        scales = zip(*(getattr(r, operand).tensors().values() for r in (ordinary, extreme)), strict=True)
        for scale, other in scales:
            torch.testing.assert_close(scale * 2.0**exponent, other, rtol=0, atol=0)
    assert extreme.snr == pytest.approx(ordinary.snr)
    assert extreme.distance_after == pytest.approx(ordinary.distance_after * 4.0 ** (left + right))


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5).eval()


def drawn_vit() -> VisionTransformer:
    """Return the same with weights drawn here. Releases of timm draw others, and a norm of 1e18 makes attention choose.

    Of what is nearly as likely a quantized model may choose the other: these weights have no such ties.
    """
    model, generator = vit(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


#: Parameter, and what is done to it.
EXTREMES: dict[str, tuple[str, Any]] = {
    "denormal weights": ("blocks.0.mlp.fc1.weight", lambda w: w.mul_(1e-44 / w.abs().max())),
    "a denormal row": ("blocks.0.attn.qkv.weight", lambda w: w[0].fill_(1e-42)),
    "denormal patches": ("patch_embed.proj.weight", lambda w: w.mul_(1e-40)),
    "a dead channel": ("blocks.0.mlp.fc1.weight", lambda w: w[0].zero_()),
    "weights of zero": ("blocks.0.attn.qkv.weight", lambda w: w.zero_()),
    "a denormal norm": ("blocks.0.norm2.weight", lambda w: w.fill_(1e-42)),
    "a large norm": ("blocks.0.norm1.weight", lambda w: w.fill_(1e18)),
    "large logits": ("head.weight", lambda w: w.mul_(1e30)),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("recipe", [ptq.recipes.ptq4vit(), ptq.recipes.base_ptq()], ids=["ptq4vit", "base_ptq"])
def test_a_model_of_extreme_weights_is_quantized(small_images, case, recipe):
    model = drawn_vit()
    name, change = EXTREMES[case]
    with torch.no_grad():
        change(model.get_parameter(name))
    converted = ptq.quantize(model, small_images, qconfig_mapping=recipe.with_search(n=20), progress=False)
    for key, params in converted.calibration.params.items():
        assert_usable(params, converted.plan.quantizers[key])
    with torch.inference_mode():
        expected, actual = model(small_images).double(), converted(small_images).double()
    assert (actual - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    "images", [torch.ones(4, 3, 16, 16), torch.zeros(4, 3, 16, 16), torch.full((4, 3, 16, 16), 1e-42)]
)
def test_constant_images_calibrate(images):
    converted = ptq.quantize(vit(), images, progress=False)
    for key, params in converted.calibration.params.items():
        assert_usable(params, converted.plan.quantizers[key])
    with torch.inference_mode():
        torch.testing.assert_close(converted(images), vit()(images), rtol=0, atol=0.05)


def test_a_model_that_overflows_is_refused(small_images):
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.mul_(1e38)
    with pytest.raises(ptq.PTQError, match=r"calibrate: .*: expected finite values, got NaN or infinity"):
        ptq.quantize(model, small_images, progress=False)


def test_logits_whose_squares_are_infinite_are_compared():
    logits = np.array([[1e30, 2e30], [3e30, -1e30]], np.float32)
    assert compare(logits, logits).cosine == pytest.approx(1.0)
    assert compare(logits, logits[:, ::-1]).cosine < 0.9
