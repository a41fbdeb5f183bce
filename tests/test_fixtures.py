"""Accuracy and parity on trained models and real images."""

from __future__ import annotations

import pytest
import torch

import ptq4vit_fx as ptq

pytestmark = pytest.mark.fixtures


def top1(model, images):
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(50)]).argmax(1)


@pytest.mark.parametrize("name", ["deit_tiny_p8_64", "swin_micro_64"])
def test_w8a8_is_nearly_lossless(trained, name):
    model, size = trained.load_model(name)
    converted = ptq.quantize(model, trained.load_images("calib", 32, size)[0], progress=False)
    images, labels = trained.load_images("val", 1000, size)
    loss = (top1(model, images) == labels).float().mean() - (top1(converted, images) == labels).float().mean()
    assert loss < 0.01  # one point: the standard error of the difference on 1,000 images is half a point


# Below a fifth of the uniform error from m = 7 on; at m = 4 the fine step is still twice a typical attention weight.
@pytest.mark.parametrize(("shift", "share"), [(4, 0.4), (7, 0.2), (8, 0.2)])
def test_softmax_twin_has_no_offset_and_less_error_than_uniform(trained, shift, share):
    model, size = trained.load_model("vit_s14")
    images = trained.load_images("calib", 4, size)[0]
    prepared = ptq.prepare_fx(model, ptq.recipes.ptq4vit(4, 4), images[:1])
    from ptq4vit_fx.capture import capture, pseudo_label_loss

    op = prepared.plan.op("blocks.5.attn.matmul_av")
    seen = capture(prepared, [op], [images], loss=pseudo_label_loss, with_gradient=False)
    attention = torch.cat(seen[op.name].lhs).flatten()
    twin = ptq.TwinUniform(4, "softmax")
    params = twin.softmax_params(shift, attention)
    small = attention[attention < float(twin.threshold(params))]
    error = twin.fake_quantize(small.clone(), params) - small
    uniform = ptq.Uniform(4)
    uniform_error = uniform.fake_quantize(small.clone(), uniform.initial_scale(attention.max())) - small
    assert error.abs().mean() < uniform_error.abs().mean() * share
    assert error.mean().abs() < 0.02 * twin.threshold(params)
