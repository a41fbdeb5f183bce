"""Which twins become uniform, and what is said about it."""

from __future__ import annotations

import pytest
import torch

import ptq4vit_fx as ptq
from ptq4vit_fx.export.proof.product_timing import ProductShapes, measure_branches, product_model
from ptq4vit_fx.export.proof.runtime_graph import runtime_graph
from ptq4vit_fx.tools.digits import load_digits_images, load_digits_model

SEARCH = {"n": 20, "rounds": 1, "max_shift": 4}


@pytest.fixture(scope="module")
def digits_vit():
    """Trained: attention and GELU have a few large values, which random weights do not give."""
    return load_digits_model()


@pytest.fixture(scope="module")
def digits():
    return load_digits_images("train")[0][:8]


@pytest.fixture(scope="module")
def calibrated(digits_vit, digits):
    mapping = ptq.recipes.ptq4vit(4, 4).with_search(**SEARCH)
    prepared = ptq.prepare_fx(digits_vit, mapping, digits[:1])
    ptq.calibrate(prepared, digits, progress=False)
    return prepared


def choose(calibrated, images, **kwargs):
    return ptq.choose_twins(calibrated, images, progress=False, **kwargs)


@pytest.fixture(scope="module")
def everything_uniform(calibrated, digits):
    return choose(calibrated, digits, uniform=[".*"])


def test_uniform_everywhere_is_the_recipe_without_twins(digits_vit, digits, everything_uniform):
    chosen, report = everything_uniform
    mapping = ptq.recipes.ptq4vit(4, 4, twins="uniform").with_search(**SEARCH)
    prepared = ptq.prepare_fx(digits_vit, mapping, digits[:1])
    expected = ptq.calibrate(prepared, digits, progress=False)
    assert chosen.plan.quantizers == prepared.plan.quantizers
    assert chosen.calibration.fingerprint() == expected.fingerprint()
    assert chosen.calibration.distances == expected.distances
    assert chosen.calibration.snr == expected.snr
    for choice in report.choices:
        assert choice.uniform == pytest.approx(expected.distances[choice.op][1] / len(digits))
    products = sum(prepared.plan.multiplications.values())
    assert report.multiplications[1] == products < report.multiplications[0]
    assert report.divergences is None


@pytest.mark.parametrize("kl_added", [0.0, 0.02, 1e9])
def test_auto_is_at_most_so_much_farther_from_float(calibrated, digits, kl_added):
    others = load_digits_images("train")[0][8:40]
    chosen, report = choose(calibrated, digits, held_out=others, kl_added=kl_added)
    exact, own = report.divergences
    assert own <= exact + max(kl_added, 0.1 * exact)
    kept = {choice.op for choice in report.choices if choice.chosen == "twin"}
    assert {key for key, q in chosen.plan.quantizers.items() if isinstance(q, ptq.TwinUniform)} == {
        f"{op}:lhs" for op in kept
    }
    if kl_added in (0.0, 1e9):
        assert bool(kept) == (kl_added == 0.0)
    assert f"{4 - len(kept)} of 4 twins become uniform; KL from float {own:.2g}" in str(report)
    again, _ = choose(calibrated, digits, held_out=others, kl_added=kl_added)
    assert again.calibration.fingerprint() == chosen.calibration.fingerprint()


def test_chosen_products_are_named_one_product_each_and_proved(tmp_path, calibrated, digits):
    before = calibrated.calibration.fingerprint()
    chosen, report = choose(calibrated, digits, uniform=[r"blocks\.1\..*", "blocks.0.attn.matmul_av"])
    assert calibrated.calibration.fingerprint() == before
    assert sum(isinstance(q, ptq.TwinUniform) for q in calibrated.plan.quantizers.values()) == 4
    left = [key for key, q in chosen.plan.quantizers.items() if isinstance(q, ptq.TwinUniform)]
    assert left == ["blocks.0.mlp.fc2:lhs"]
    assert "3 of 4 twins become uniform; 1." in str(report)
    converted = ptq.convert_fx(chosen)
    exported = ptq.export_onnx(converted, tmp_path / "model.onnx", digits[:1])
    assert exported.path.exists()
    verified = ptq.verify_onnx(tmp_path / "model.onnx", converted, digits)
    assert verified.same_functions.bit_equal == 1.0
    assert ptq.Calibration.load(saved(chosen, tmp_path)).plan == chosen.plan


def saved(chosen, folder):
    chosen.calibration.save(folder / "scales.safetensors")
    return folder / "scales.safetensors"


@pytest.mark.parametrize(
    ("lhs", "rhs", "kind"),
    [((1, 2, 17, 17), (1, 2, 17, 16), "matmul"), ((1, 17, 128), (32, 128), "linear"), ((17, 128), (32, 128), "linear")],
)
def test_the_timed_products_are_integer_products(lhs, rhs, kind):
    shapes = ProductShapes(kind, lhs, rhs, kind == "linear")
    for branches in (1, 2):
        graph = runtime_graph(product_model(shapes, branches))
        assert len(graph.integer_products) == branches
        assert not graph.float_products
    assert all(seconds > 0 for seconds in measure_branches(shapes, (2, 1)))


def test_what_cannot_be_chosen_is_refused_in_one_sentence(small_vit, small_images, calibrated, digits):
    with pytest.raises(ptq.PTQError, match=r"choose_twins: 'blocks.9': expected a product with a twin, got no match"):
        choose(calibrated, digits, uniform=["blocks.9"])
    with pytest.raises(ptq.PTQError, match="expected a prepared model"):
        choose(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), small_images)
    for recipe, message in (
        (ptq.recipes.ptq4vit(twins="uniform").with_search(**SEARCH), "expected at least one twin, got none"),
        (
            ptq.recipes.ptq4vit().with_search(metric="mse", **SEARCH),
            "expected distances that compare products, got mse",
        ),
    ):
        prepared = ptq.prepare_fx(small_vit, recipe, small_images[:1])
        ptq.calibrate(prepared, small_images[:2], progress=False)
        with pytest.raises(ptq.PTQError, match=message):
            choose(prepared, small_images[:2])
