"""Calibration as a whole: checkpoints, memory, losses, sequential mode, reports, and input that breaks others."""

from __future__ import annotations

import json
import re
from functools import partial
from threading import Lock

import numpy as np
import pytest
import torch
from graphs import model_of
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.calibrating import group_search
from ptq4vit_fx.calibrating.capture import capture, captured_product
from ptq4vit_fx.calibrating.gradients import SteadySoftmax
from ptq4vit_fx.calibrating.losses import fisher, get_loss, pseudo_label
from ptq4vit_fx.calibrating.memory import PLANNED_SHARE, RESERVED, SEARCH_FACTOR, MemoryBudget
from ptq4vit_fx.inputs.sealed_tensors import sealed
from ptq4vit_fx.search.search_op import search_op

QUICK = ptq.recipes.ptq4vit().with_search(n=8, rounds=1)
#: A memory_limit that is just enough for the small ViT: its products are captured in several groups.
LITTLE = RESERVED + 1_600_000


def prepared_for(model, images, mapping=QUICK):
    return ptq.prepare_fx(model, mapping, images[:1])


def calibrate(prepared, images, **arguments):
    return ptq.calibrate(prepared, images, progress=False, **arguments)


def vit(**arguments):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**(settings | arguments)).eval()


@pytest.fixture
def searched(monkeypatch):
    """Names of the products that are searched; the search fails where `names.stop` is reached, like Ctrl-C."""

    class Names(list):
        stop: int | None = None

    names, lock = Names(), Lock()

    def watched(op, *args, **kwargs):
        with lock:
            if len(names) == names.stop:
                raise KeyboardInterrupt
            names.append(op.name)
        return search_op(op, *args, **kwargs)

    monkeypatch.setattr(group_search, "search_op", watched)
    return names


@pytest.mark.parametrize("arguments", [{}, {"loss": "fisher"}, {"sequential": True}, {"memory_limit": LITTLE}])
def test_resumed_calibration_equals_an_unbroken_one(tmp_path, small_vit, small_images, searched, arguments):
    path = tmp_path / "scales.safetensors"
    unbroken = calibrate(prepared_for(small_vit, small_images), small_images, **arguments)
    total = len(searched)
    searched.clear()
    searched.stop = 4
    prepared = prepared_for(small_vit, small_images)
    with pytest.raises(KeyboardInterrupt):
        calibrate(prepared, small_images, checkpoint=path, **arguments)
    with pytest.raises(ptq.PTQError, match="call calibrate"):
        ptq.convert_fx(prepared)
    with pytest.raises(ptq.PTQError, match=rf"lacks {2 * (total - 4)} of {2 * total} sites; finish it with calibrate"):
        ptq.load_calibration(prepared, ptq.Calibration.load(path))
    searched.stop = None
    resumed = calibrate(prepared, small_images, checkpoint=path, **arguments)
    assert len(searched) == total
    assert resumed.fingerprint() == unbroken.fingerprint()
    assert resumed.distances == unbroken.distances
    calibrate(prepared, small_images, checkpoint=path, **arguments)
    assert len(searched) == total


def test_checkpoint_of_something_else_is_refused(tmp_path, small_vit, small_images):
    path = tmp_path / "scales.safetensors"
    calibrate(prepared_for(small_vit, small_images), small_images, checkpoint=path)
    before = path.read_bytes()
    other = prepared_for(small_vit, small_images, QUICK.with_search(rounds=2))
    for prepared, images, arguments, what in (
        (other, small_images, {}, "plan"),
        (prepared_for(small_vit, small_images), small_images[:4], {}, "images"),
        (prepared_for(vit(depth=2), small_images), small_images, {}, "weights"),
        (prepared_for(small_vit, small_images), small_images, {"seed": 1}, "seed"),
        (prepared_for(small_vit, small_images), small_images, {"loss": "fisher"}, "loss"),
    ):
        if what == "weights":
            nn.init.ones_(prepared.get_parameter("head.bias"))
        with pytest.raises(ptq.PTQError, match=f"got another {what}; choose another path or delete the file"):
            calibrate(prepared, images, checkpoint=path, **arguments)
    with pytest.raises(ptq.PTQError, match="expected a file in an existing, writable folder"):
        calibrate(other, small_images, checkpoint=tmp_path / "none" / "scales.safetensors")
    assert path.read_bytes() == before


def test_a_file_gives_back_the_parameters_of_both_kinds_of_quantizers(tmp_path, small_vit, small_images):
    path = tmp_path / "scales.safetensors"
    calibration = calibrate(prepared_for(small_vit, small_images), small_images)
    calibration.save(path)
    read = ptq.Calibration.load(path)
    assert {tuple(params.tensors()) for params in read.params.values()} == {("scale",), ("fine_scale", "coarse_scale")}
    assert {params.axis for params in read.params.values()} == {None, 0, -3}
    assert {key: params.axis for key, params in read.params.items()} == {
        key: params.axis for key, params in calibration.params.items()
    }
    assert read.fingerprint() == calibration.fingerprint()
    assert sorted(read.report().splitlines()) == sorted(calibration.report().splitlines())
    assert read.plan == calibration.plan
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata()
    assert {"head:rhs/scale", "blocks.0.attn.matmul_av:lhs/fine_scale"} <= tensors.keys()
    tensors["elsewhere:lhs/scale"] = torch.ones(())
    save_file(tensors, path, metadata)
    with pytest.raises(ptq.PTQError, match="expected what was saved, got other content than that with the digest"):
        ptq.Calibration.load(path)
    del metadata["digest"]
    path.write_bytes(sealed(tensors, metadata))
    with pytest.raises(ptq.PTQError, match="elsewhere:lhs: expected a site of the plan in the same file, got another"):
        ptq.Calibration.load(path)


def test_less_memory_means_more_passes_and_the_same_scales(small_vit, small_images):
    plenty = calibrate(prepared_for(small_vit, small_images), small_images)
    little = calibrate(prepared_for(small_vit, small_images), small_images, memory_limit=LITTLE)
    assert plenty.provenance["capture_groups"] == 1
    assert little.provenance["capture_groups"] > 1
    assert little.fingerprint() == plenty.fingerprint()


def test_a_limit_that_cannot_hold_is_refused_before_the_work(small_vit, small_images, searched):
    prepared = prepared_for(small_vit, small_images)
    many, one = small_images.repeat(10, 1, 1, 1), small_images[:1]
    for limit, images, what in (
        (LITTLE, many, "patch_embed.proj, .* and 10 more"),
        (RESERVED + 1_000_000, one, "forward and backward of one image"),
    ):
        match = rf"memory_limit: expected \d+ MiB, as {what}.* takes about .*; raise it to .* or use fewer or smaller"
        with pytest.raises(ptq.PTQError, match=match):
            calibrate(prepared, images, memory_limit=limit)
    assert not searched


def weights_of(prepared, images, loss, name="head"):
    seen = capture(prepared, [prepared.plan.op(name)], [(images,)], loss=loss, with_gradient=True)
    return captured_product(prepared.plan.op(name), seen[name]).element_weight[0, 0].numpy()


def test_fisher_weights_are_the_expectation_over_the_prediction(small_vit, small_images):
    with torch.no_grad():
        p = small_vit(3 * small_images).double().softmax(-1).numpy()
    error = p[:, None, :] - np.eye(5)  # (image, label, class): dL/dlogit for each label
    expected = np.einsum("bl,blc->bc", p, error**2)
    prepared = prepared_for(small_vit, small_images)
    drawn = weights_of(prepared, 3 * small_images, fisher(seed=0, draws=1000))
    np.testing.assert_allclose(drawn, expected, atol=1e-3)
    few = [weights_of(prepared, 3 * small_images, fisher(seed=s)) for s in range(200)]
    np.testing.assert_allclose(np.mean(few, 0), expected, atol=0.035)  # four standard errors
    label = p.argmax(1)
    chosen = error[np.arange(12), label] ** 2
    np.testing.assert_allclose(weights_of(prepared, 3 * small_images, pseudo_label), chosen, rtol=1e-4)


def test_fisher_draws_follow_the_seed(small_vit, small_images):
    fingerprints = [
        calibrate(prepared_for(small_vit, small_images), small_images, loss="fisher", seed=seed).fingerprint()
        for seed in (3, 3, 4)
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_sequential_search_sees_what_the_quantized_products_give(small_vit, small_images, monkeypatch):
    inputs = {}

    def watched(op, product, *args, **kwargs):
        inputs[op.name] = product.lhs
        return search_op(op, product, *args, **kwargs)

    monkeypatch.setattr(group_search, "search_op", watched)
    mapping = ptq.recipes.base_ptq(4, 4).with_search(n=8)
    prepared = prepared_for(small_vit, small_images, mapping)
    calibrate(prepared, small_images, sequential=True)
    simulated = ptq.convert_fx(prepared)
    with torch.no_grad():
        logits = simulated(small_images)
    weight, bias = (small_vit.head.weight, small_vit.head.bias)
    quantizer, params = prepared.plan.quantizers, prepared.calibration.params
    x = quantizer["head:lhs"].fake_quantize(inputs["head"][0, 0], params["head:lhs"])
    w = quantizer["head:rhs"].fake_quantize(weight, params["head:rhs"])
    torch.testing.assert_close(x @ w.t() + bias, logits, rtol=0, atol=1e-4)
    calibrate(prepared, small_images)
    assert not torch.allclose(quantizer["head:lhs"].fake_quantize(inputs["head"][0, 0], params["head:lhs"]), x)


def test_report_gives_scales_distances_and_signal_to_noise(small_vit, small_images):
    prepared = prepared_for(small_vit, small_images)
    calibration = calibrate(prepared, small_images)
    weight = small_vit.head.weight.detach().double()
    scale = calibration.params["head:rhs"].scale.double()[:, None]
    noise = scale * torch.clamp(torch.round(weight / scale), -128, 127) - weight
    expected = 10 * torch.log10(weight.square().sum() / noise.square().sum())
    rows = {row["site"]: row for row in json.loads(json.dumps(calibration.records()))}
    assert rows["head:rhs"]["snr"] == pytest.approx(float(expected), abs=0.01)
    assert (
        rows["blocks.0.attn.matmul_av:lhs"]["threshold"]
        == 2.0 ** -calibration.params["blocks.0.attn.matmul_av:lhs"].shift
    )
    assert len(rows) == len(prepared.plan.quantizers)
    line = next(text for text in calibration.report().splitlines() if text.startswith("head:rhs "))
    assert line.split()[-1] == f"{float(expected):.1f}"


class Features(nn.Module):
    """A model whose output is not logits."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.model, self.wrap = vit(num_classes=0), wrap

    def forward(self, x: torch.Tensor):
        return self.wrap(self.model(x))


@pytest.mark.parametrize(
    ("wrap", "got", "loss"),
    [
        (lambda x: (x, x), "got tuple", lambda output: output[0].square().sum()),
        (lambda x: {"features": x}, "got dict", lambda output: output["features"].square().sum()),
        (lambda x: x[:, None], r"got \(8, 1, 32\)", lambda output: output.square().sum()),
    ],
)
def test_output_without_classes_needs_a_loss(small_images, wrap, got, loss):
    prepared = prepared_for(Features(wrap), small_images)
    with pytest.raises(ptq.PTQError, match=f"expected logits.*{got}; pass loss="):
        calibrate(prepared, small_images)
    calibration = calibrate(prepared, small_images, loss=loss)
    assert set(calibration.params) == set(prepared.plan.quantizers)
    with pytest.raises(ptq.PTQError, match="expected one of pseudo_label, fisher"):
        calibrate(prepared, small_images, loss="fischer")


@pytest.mark.parametrize("named", ["fisher", "projection"])
def test_what_a_loss_draws_for_an_image_does_not_depend_on_its_batch(named):
    outputs = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for sizes in ([9], [4, 5], [1] * 9):
        loss, gradients = get_loss(named, 3), []
        for part in outputs.split(sizes):
            logits = part.clone().requires_grad_()
            gradients.append(torch.stack([torch.autograd.grad(x, logits, retain_graph=True)[0] for x in loss(logits)]))
        found.append(torch.cat(gradients, 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_recipe_says_its_loss_unless_calibrate_is_told_another(small_vit, small_images):
    recipe = QUICK.with_loss("projection")
    assert QUICK.loss == "pseudo_label"
    own, told, plain = (
        calibrate(prepared_for(small_vit, small_images, mapping), small_images, **arguments)
        for mapping, arguments in ((recipe, {}), (QUICK, {"loss": "projection"}), (recipe, {"loss": "pseudo_label"}))
    )
    assert own.fingerprint() == told.fingerprint() != plain.fingerprint()
    assert [c.provenance["loss"] for c in (own, told, plain)] == ["projection", "projection", "pseudo_label"]
    assert ptq.QuantPlan.from_json(own.plan.to_json()).loss == "projection"
    assert (ptq.recipes.best().loss, ptq.recipes.ptq4vit().loss) == ("projection", "pseudo_label")
    with pytest.raises(ptq.PTQError, match=r"with_loss: .*expected one of pseudo_label, fisher"):
        recipe.with_loss("fischer")


def works(model, images):
    """Return the relative error of the quantized model, after checking that it is finite."""
    converted = ptq.quantize(model, images, qconfig_mapping=QUICK, progress=False)
    images = images if isinstance(images, torch.Tensor) else torch.cat(images)
    with torch.no_grad():
        exact, quantized = model(images), converted(images)
    assert torch.isfinite(quantized).all()
    return float((quantized - exact).norm() / exact.norm().clamp_min(1e-9))


def test_constant_images_all_zero_weights_and_tiny_shapes(small_images):
    # range zero at the patches; all tokens equal, so that the coarse steps of softmax are 7 % off and nothing averages
    assert works(vit(), torch.zeros(4, 3, 16, 16)) < 0.1
    assert works(vit(), small_images[:1]) < 0.02
    assert works(vit(patch_size=16, class_token=False, global_pool="avg"), small_images) < 0.02  # one token
    assert works(vit(embed_dim=8, num_heads=8), small_images) < 0.02  # head dimension 1
    assert works(vit(), list(small_images.split([1, 4, 7]))) < 0.02
    silent = vit()
    nn.init.zeros_(silent.blocks[0].mlp.fc1.weight)
    nn.init.zeros_(silent.blocks[0].attn.proj.weight)
    assert works(silent, small_images) < 0.02


def test_a_model_of_zeros_stays_zero_and_its_lost_gradients_are_one_warning(small_images):
    model = vit()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.warns(ptq.PTQWarning) as warned:
        assert works(model, small_images) == 0.0
    (said,) = (str(w.message) for w in warned if "gradient" in str(w.message))
    products = len(prepared_for(model, small_images).plan.ops) - 1  # the head's output has one
    names = r"patch_embed.proj, blocks.0.attn.qkv, blocks.0.attn.matmul_qk"
    assert re.match(
        rf"products that no gradient of the loss reaches: {products} \({names} and {products - 3} more\);", said
    )


def test_weak_operands_and_products_are_named_once_and_listed_in_the_report(small_vit, small_images):
    prepared = ptq.prepare_fx(small_vit, ptq.recipes.ptq4vit(2, 2), small_images[:1])
    with pytest.warns(ptq.PTQWarning) as warned:
        calibration = calibrate(prepared, torch.cat([small_images, small_images.flip(3)]))
    said = [str(w.message) for w in warned]
    weak = {name for name, value in calibration.snr.items() if ":" in name and value < 10}
    lossy = {name for name, share in calibration.shares.items() if share > 0.1}
    assert len(weak) > 3
    assert len(lossy) > 3
    assert [text.split(" (")[0] for text in said] == [
        f"operands below 10 dB: {len(weak)}",
        f"products with a distance above 10% of their output's energy: {len(lossy)}",
    ]
    report = calibration.report()
    assert all(f"    {name} " in report for name in weak | lossy)
    assert calibration.remarks()[0].names[0].split()[0] == min(weak, key=lambda name: calibration.snr[name])


def test_a_calibration_of_eight_bits_has_nothing_to_say(small_converted):
    assert small_converted.calibration.remarks() == ()


def test_near_uniform_attention_keeps_its_values():
    torch.manual_seed(0)
    model = vit(img_size=64, patch_size=4, embed_dim=48, depth=1, num_heads=3, num_classes=7)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    prepared = ptq.prepare_fx(model, ptq.recipes.ptq4vit(), images[:1])
    calibration = calibrate(prepared, images)
    assert calibration.snr["blocks.0.attn.matmul_av:lhs"] > 40
    assert calibration.snr["blocks.0.attn.matmul_av:rhs"] > 35


def test_infinite_activations_are_named(small_images):
    model = vit()
    nn.init.constant_(model.blocks[0].mlp.fc1.weight, 1e38)
    with pytest.raises(ptq.PTQError, match=r"input of blocks.0.mlp.fc2: expected finite values, got NaN or infinity"):
        calibrate(prepared_for(model, small_images), small_images)


@pytest.mark.parametrize("recipe", ["ptq4vit", "best"])
def test_the_number_of_threads_changes_no_gradient_no_scale_and_no_code(recipe):
    images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = vit(img_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)  # rows of 37 tokens
    threads = torch.get_num_threads()
    prints: set[str] = set()
    gradients: list[torch.Tensor] = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            prepared = ptq.prepare_fx(model, getattr(ptq.recipes, recipe)(), images[:1])
            seen = capture(prepared, prepared.plan.ops, [(images,)], loss=fisher(), with_gradient=True)
            gradients.append(torch.cat([part.flatten() for op in seen.values() for part in op.importance]))
            prints.add(calibrate(prepared, images).fingerprint())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert len(prints) == 1


@pytest.mark.parametrize("shape", [(64, 37), (64, 200), (8, 3, 65, 65), (3, 1)])
def test_the_gradient_of_softmax_is_the_same_for_every_number_of_threads(shape):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    g = torch.randn(shape, generator=generator)
    threads = torch.get_num_threads()
    gradients: list[torch.Tensor] = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            with SteadySoftmax():
                gradients += torch.autograd.grad((x.softmax(-1) * g).sum(), x)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    z = x.detach().double().numpy()
    e = np.exp(z - z.max(-1, keepdims=True))
    s = e / e.sum(-1, keepdims=True)
    exact = s * (g.numpy() - (g.numpy() * s).sum(-1, keepdims=True))
    np.testing.assert_allclose(gradients[0].numpy(), exact, atol=1e-6)


def test_searches_beside_each_other_fit_into_the_limit(small_vit, small_images):
    prepared = prepared_for(small_vit, small_images)
    ops = prepared.plan.ops
    tight, images = MemoryBudget.of(prepared, 1), 100
    search = {op.name: SEARCH_FACTOR * images * tight.captured[op.name] + tight.weights[op.name] for op in ops}
    largest = max(search.values())
    assert tight.searches(ops, images, 4) == 1
    for searches in (2, 4):
        planned = (2 * searches + 1) * largest  # half of it is for searches
        budget = MemoryBudget.of(prepared, RESERVED + round(planned / PLANNED_SHARE))
        assert budget.searches(ops, images, 4) == searches
        groups = budget.groups(ops, images, searches)
        assert [op for group in groups for op in group] == list(ops)
        for group in groups:
            held = sum(images * budget.captured[op.name] for op in group)
            assert held + searches * largest <= planned


def test_an_operand_that_is_written_later_is_calibrated_as_it_was_read():
    def forward(m, x, write):
        tokens = m.norm(x.flatten(2).transpose(1, 2))
        first = m.a(tokens)
        if write:
            tokens[:, 1:] = 100.0
        return first.mean(1) + tokens.mean() * 0

    torch.manual_seed(0)
    layers = {"norm": nn.LayerNorm(3), "a": nn.Linear(3, 7)}
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scales = []
    for write in (False, True):
        prepared = ptq.prepare_fx(model_of(partial(forward, write=write), **layers), ptq.recipes.ptq4vit(), images[:1])
        scales.append(ptq.calibrate(prepared, images, progress=False).params["a:lhs"].tensors()["scale"])
    assert torch.equal(*scales)
