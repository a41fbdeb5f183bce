"""A form for each product: what it costs, what it gains, and that the whole keeps what was asked for."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import timm
import torch

import ptq4vit_fx as ptq
from ptq4vit_fx.export.proof import product_timing
from ptq4vit_fx.export.proof.product_timing import ProductShapes, measure_branches
from ptq4vit_fx.export.proof.runtime import open_model
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.passes.graph.stages import float_products
from ptq4vit_fx.tuning.allocation import Option, allocate
from ptq4vit_fx.tuning.form_search import path_of, search_forms
from ptq4vit_fx.tuning.forms import EXACT, FLOAT, Form, candidates_of, form_of
from ptq4vit_fx.tuning.forms import UNIFORM as OWN_UNIFORM
from ptq4vit_fx.tuning.measuring import Measuring, divergence
from ptq4vit_fx.tuning.mixing import mixed_calibration, model_of_plan, product_shapes, with_calibration
from ptq4vit_fx.tuning.timings import BRANCHES, load_timings, measure_timings

SEARCH = {"n": 8, "rounds": 1, "max_shift": 3}
FC2, AV = "blocks.0.mlp.fc2", "blocks.0.attn.matmul_av"
TWIN, UNIFORM = Form(8, 8), Form(8, 8, twins=False)

pytestmark = pytest.mark.filterwarnings("ignore::ptq4vit_fx.errors.PTQWarning")


def tiny(depth=2):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=7
    )
    with torch.no_grad():
        model.head.weight.mul_(30)
    return model.eval()


def pictures(count, seed):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


DATA, HELD = pictures(8, 1), pictures(12, 2)


def prepared_of(model, w=8, a=8):
    return ptq.prepare_fx(model, ptq.recipes.best(w, a).with_search(**SEARCH), DATA[:1])


@pytest.fixture(scope="module")
def prepared():
    return prepared_of(tiny())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("forms")


@pytest.fixture(scope="module")
def searched(prepared, cache):
    """The calibrations of three forms, which all tests of tune find in the cache too."""
    candidates = candidates_of(prepared, (TWIN, UNIFORM, FLOAT))
    batches = batches_for(prepared, DATA, "tune")
    return candidates, search_forms(prepared, batches, candidates, cache, progress=False)


def fake(shapes):
    """A product takes 5 in float, 2 as integers, 3 with a twin."""
    return (5.0, 2.0, 3.0)


@pytest.fixture(scope="module")
def timings(prepared, searched):
    shapes = product_shapes(with_calibration(prepared, searched[1][TWIN]))
    return measure_timings(shapes.values(), "onnxruntime", 1, model="tiny", measure=fake)


def tune(prepared, cache, timings, **asked):
    return ptq.tune(prepared, DATA, held_out=HELD, timings=timings, cache=cache, progress=False, **asked)


def test_allocations_are_the_best_of_all():
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        count, forms = (int(torch.randint(1, most, (), generator=draw)) for most in (6, 5))
        numbers = torch.rand(count, forms, 2, generator=draw, dtype=torch.float64)
        numbers[..., 0] = (numbers[..., 0] - 0.1) * 10 ** -(4 * torch.rand(count, 1, generator=draw))
        options = {
            f"p{i}": [Option(f"f{j}", *map(float, pair)) for j, pair in enumerate(own)] for i, own in enumerate(numbers)
        }
        every = [(sum(o.cost for o in c), sum(o.takes for o in c)) for c in itertools.product(*options.values())]
        for bound in (0.0, 0.3 * max(cost for cost, _ in every), max(cost for cost, _ in every)):
            allowed = [pair for pair in every if pair[0] <= bound + 1e-12]
            chosen = allocate(options, cost=bound)
            assert (chosen is None) == (not allowed)
            if chosen is not None:
                picked = [next(o for o in options[name] if o.name == form) for name, form in chosen.items()]
                assert sum(o.cost for o in picked) <= bound + 1e-9
                assert sum(o.takes for o in picked) == pytest.approx(min(takes for _, takes in allowed))
        least = allocate(options, takes=max(takes for _, takes in every))
        assert least is not None
        reached = sum(next(o.cost for o in options[n] if o.name == f) for n, f in least.items())
        assert reached == pytest.approx(min(cost for cost, _ in every))


def test_of_equal_options_the_first_and_of_equal_gains_the_cheaper():
    options = [Option("a", 1.0, 1.0), Option("b", 1.0, 1.0), Option("c", 0.5, 1.0), Option("d", 0.5, 1.0)]
    assert allocate({"p": options}, cost=2.0) == {"p": "c"}
    assert allocate({"p": options}, takes=1.0) == {"p": "c"}
    assert allocate({"p": options}, cost=0.4) is None


def test_forms_have_names_and_differ_where_quantizers_do(prepared):
    for form in (FLOAT, Form(8, 8), Form(4, 6), Form(8, 8, twins=False)):
        assert form_of(form.name) == form
    own = candidates_of(prepared, (Form(8, 8), Form(8, 8, twins=False), Form(4, 8), FLOAT))
    names = {name: [form.name for form in forms] for name, forms in own.pairs.items()}
    assert names["blocks.0.attn.qkv"] == ["w8a8", "w4a8", "float"]
    assert names[FC2] == ["w8a8", "w8a8 uniform", "w4a8", "float"]
    assert names[AV] == ["w8a8", "w8a8 uniform", "float"]
    assert own.as_form(AV, Form(4, 8)) == Form(8, 8)
    narrow = candidates_of(prepared, (Form(4, 4),))
    pair = narrow.pairs["patch_embed.proj"][Form(4, 4)]
    assert pair is not None
    image, weight = pair
    assert (image.bits, weight.bits) == (8, 4)  # the image is 8-bit data


def test_forms_are_searched_as_a_calibration_of_their_own_would(prepared, searched):
    candidates, found = searched
    uniform = ptq.prepare_fx(tiny(), ptq.recipes.best(8, 8, twins="uniform").with_search(**SEARCH), DATA[:1])
    alone = ptq.calibrate(uniform, DATA, progress=False)
    assert set(found[UNIFORM].distances) == {name for name, own in candidates.pairs.items() if UNIFORM in own}
    for name, distances in found[UNIFORM].distances.items():
        assert distances == alone.distances[name]
    assert found[TWIN].fingerprint() == ptq.calibrate(prepared_of(tiny()), DATA, progress=False).fingerprint()


def test_a_product_alone_is_measured_as_by_a_whole_forward(prepared, searched):
    _, found = searched
    measuring = Measuring.of(prepared, found[TWIN], batches_for(prepared, HELD, "tune"))
    tried = {
        name: [found[TWIN], found[UNIFORM]] if name in (FC2, AV) else [found[TWIN]] for name in found[TWIN].distances
    }
    before = measuring.passes
    alone = dict(measuring.alone(tried))
    assert measuring.passes - before < 0.8 * len(HELD) / 32 * sum(map(len, tried.values()))
    for name, calibrations in tried.items():
        whole = [divergence(measuring.whole({name: own})) for own in calibrations]
        assert alone[name] == pytest.approx(whole, rel=1e-6, abs=1e-12)


def test_a_mixed_model_computes_what_was_measured_and_its_file_too(tmp_path, prepared, searched):
    candidates, found = searched
    left = ("blocks.1.attn.matmul_av", "blocks.0.attn.qkv", "blocks.1.mlp.fc1")
    forms = {name: FLOAT if name in left else UNIFORM if name == FC2 else TWIN for name in candidates.pairs}
    mixed = with_calibration(prepared, mixed_calibration(prepared.plan, found, forms))
    assert [op.name for op in prepared.plan.ops] == list(candidates.pairs)  # the given model is as it was
    converted = ptq.convert_fx(mixed)
    assert {product.name for product in float_products(converted)} == set(left)
    measuring = Measuring.of(prepared, found[TWIN], batches_for(prepared, HELD, "tune"))
    own = {name: found[form] for name, form in forms.items() if form != FLOAT}
    measured, deployed = measuring.whole(own), ptq.compare_float(converted, tiny(), HELD)
    assert deployed.divergence == pytest.approx(measured.divergence, rel=0.05)
    ptq.export_onnx(converted, tmp_path / "m.onnx", DATA[:1])
    verified = ptq.verify_onnx(tmp_path / "m.onnx", converted, HELD[:4], layers=0)
    assert verified.ok
    mixed.calibration.save(tmp_path / "mixed.safetensors")
    read = ptq.Calibration.load(tmp_path / "mixed.safetensors")
    again = ptq.convert_fx(ptq.load_calibration(model_of_plan(tiny(), read.plan, DATA[:1]), read))
    assert torch.equal(again(HELD), converted(HELD))


def test_average_bits_are_weighted_by_multiplications(prepared, searched):
    candidates, found = searched
    whole = prepared.plan.average_bits()
    assert (whole.weights, whole.activations, whole.left) == (8.0, 8.0, 0.0)
    counts = prepared.plan.multiplications
    assert counts["blocks.0.mlp.fc1"] == 17 * 32 * 128
    assert counts["blocks.0.attn.matmul_qk"] == 2 * 17 * 17 * 16
    forms = dict.fromkeys(candidates.pairs, TWIN) | {FC2: FLOAT}
    left = mixed_calibration(prepared.plan, found, forms).plan
    assert left.average_bits().left == pytest.approx(counts[FC2] / sum(counts.values()))
    assert "in float" in left.table().splitlines()[-1]
    narrow = prepared_of(tiny(), 4, 6)
    assert str(narrow.plan.average_bits()).startswith("weights 4.00, activations 6.")
    assert ptq.QuantPlan.from_json(narrow.plan.to_json()).average_bits() == narrow.plan.average_bits()


@pytest.mark.parametrize(
    "asked", [{"kl": 1e-5}, {"agreement": 0.9}, {"top1_drop": 0.0, "labels": torch.arange(12) % 7}]
)
def test_the_plan_keeps_what_is_asked_for_and_takes_no_more_than_any_other_that_does(prepared, cache, timings, asked):
    tuned = tune(prepared, cache, timings, **asked)
    held = [point for point in tuned.frontier if tuned.budget.holds(point)]
    assert tuned.point in held
    assert tuned.point.takes == min(point.takes for point in held)
    assert {"w8a8", "w8a8 uniform"} <= {point.name for point in tuned.frontier}
    assert set(tuned.point.forms) == {op.name for op in prepared.plan.ops}
    assert tuned.calibration.provenance["tuned"]["chosen"] == tuned.point.to_dict()
    json.dumps(tuned.to_dict())
    assert ("rank correlation" if tuned.sensitivity.images else "no product was measured alone") in tuned.report()


@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_twins_become_uniform_in_the_bits_of_the_plan_as_far_as_the_whole_allows(bits):
    """Multiplications are those of one image, twice with a twin; what may be added is beside all exact."""
    torch.manual_seed(1)
    model = prepared_of(tiny(), *bits)
    none, every = (
        ptq.tune(model, DATA, held_out=HELD, progress=False, kl_added=added, minimize="multiplications")
        for added in (0.0, 1e9)
    )
    exact, uniform = (next(p for p in none.frontier if p.name == form.name) for form in (EXACT, OWN_UNIFORM))
    counts, twins = model.plan.multiplications, {name for name, form in uniform.forms.items() if form == "uniform"}
    assert twins == {f"blocks.{i}.{name}" for i in range(2) for name in ("attn.matmul_av", "mlp.fc2")}
    assert uniform.takes == sum(counts.values())
    assert exact.takes == uniform.takes + sum(counts[name] for name in twins)
    assert none.point.divergence <= 1.1 * exact.divergence
    assert none.budget.kl == pytest.approx(1.1 * exact.divergence)
    assert dict(every.point.forms) == dict(uniform.forms)
    assert every.sensitivity.images == 0  # the cheapest plan holds, no product needs to be known alone
    quantizers = every.plan.quantizers
    assert {key: q.bits for key, q in quantizers.items()} == {key: q.bits for key, q in model.plan.quantizers.items()}
    assert not any(isinstance(q, ptq.TwinUniform) for q in quantizers.values())
    searched = prepared_of(tiny(), *bits)
    ptq.calibrate(searched, DATA, progress=False)
    same = ptq.choose_twins(searched, DATA, uniform=[".*"], progress=False)[0]
    assert same.calibration.fingerprint() == every.calibration.fingerprint()


def test_where_not_all_twins_can_go_only_products_that_have_them_are_measured(prepared):
    tuned = ptq.tune(prepared, DATA, held_out=HELD, progress=False, kl_added=1e-9, minimize="multiplications")
    measured = {cost.product for cost in tuned.sensitivity.costs if cost.measured is not None}
    assert measured == {f"blocks.{i}.{name}" for i in range(2) for name in ("attn.matmul_av", "mlp.fc2")}
    exact, uniform = (next(p for p in tuned.frontier if p.name == name) for name in ("exact", "uniform"))
    assert tuned.point.divergence <= 1.1 * exact.divergence < uniform.divergence
    assert tuned.point.takes > uniform.takes


def test_a_tighter_budget_takes_more_and_the_same_one_gives_the_same_plan(tmp_path, prepared, cache, timings):
    files = {form: path_of(cache, form).stat().st_mtime_ns for form in (TWIN, UNIFORM)}
    loose, tight = (tune(prepared, cache, timings, kl=kl) for kl in (1.0, 2e-6))
    assert loose.point.takes <= tight.point.takes
    assert tight.point.divergence <= 2e-6
    assert "float" in tight.point.counts()
    again = tune(prepared, cache, timings, kl=2e-6)
    assert again.plan == tight.plan
    assert again.calibration.fingerprint() == tight.calibration.fingerprint()
    assert files == {form: path_of(cache, form).stat().st_mtime_ns for form in files}  # nothing was searched again
    assert torch.isfinite(ptq.convert_fx(tight.prepared)(HELD)).all()
    tight.draw(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_within_a_limit_the_best_plan_is_taken(prepared, cache, timings):
    least = tune(prepared, cache, timings, kl=100.0).point.takes
    tuned = tune(prepared, cache, timings, limit=least + 2.0)
    assert tuned.point.takes <= least + 2.0
    assert tuned.point.predicted <= min(p.predicted for p in tuned.frontier if p.takes <= least + 2.0) + 1e-12
    with pytest.raises(ptq.PTQError, match="tune: limit: expected what some plan takes, got 1; allow "):
        tune(prepared, cache, timings, limit=1.0)


def test_bits_and_bytes_are_made_small_too(prepared):
    forms = ["w8a8", "w4a4", "float"]
    given = {"held_out": HELD, "forms": forms, "progress": False}
    bits = ptq.tune(prepared, DATA, kl=0.01, minimize="average bits", **given)
    uniform = {point.name: point for point in bits.frontier}
    assert not bits.budget.holds(uniform["w4a4"])
    assert bits.point.divergence <= 0.01
    assert bits.point.takes < uniform["w8a8"].takes
    assert bits.plan.average_bits().weights < 8
    packed = ptq.tune(prepared, DATA, kl=0.01, minimize="size", target="generic", opset=21, **given)
    whole = ptq.tune(prepared, DATA, kl=0.01, minimize="size", **given)
    assert packed.point.takes < whole.point.takes  # the target of ONNX Runtime keeps 4 bits in a byte
    weighted = {op.name for op in prepared.plan.ops if op.rhs_is_weight}
    assert {form for name, form in whole.point.forms.items() if name in weighted} == {"w8a8"}  # others take no bytes


@pytest.fixture(scope="module")
def hostile():
    """One input channel of an fc2 is 200 times as large as the others, and one block's attention is one-hot."""
    model = tiny(depth=3)
    with torch.no_grad():
        fc1, fc2, qkv = model.blocks[1].mlp.fc1, model.blocks[1].mlp.fc2, model.blocks[2].attn.qkv
        fc1.weight[5] *= 200
        fc1.bias[5] *= 200
        fc2.weight[:, 5] /= 20
        qkv.weight[:64] *= 60
    prepared = prepared_of(model)
    ptq.calibrate(prepared, DATA, progress=False)
    return prepared


def test_what_is_hostile_is_found_by_tune_and_named_by_why(hostile):
    reasons = ptq.why(hostile, HELD)
    named = {culprit.product: culprit for culprit in reasons.culprits}
    first = list(named)[:3]
    assert "blocks.1.mlp.fc2" in first
    scores = next(name for name in first if name in ("blocks.2.attn.qkv", "blocks.2.attn.matmul_qk"))
    outlier = next(o for o in named["blocks.1.mlp.fc2"].outliers["lhs"] if o.what == "channel")
    assert outlier.number == 5
    assert outlier.times > 20
    assert "blocks.1.mlp.fc2:" in str(reasons)
    assert "lhs, channel 5" in str(reasons)
    assert named[scores].one_hot > 0.95
    assert "softmax is one-hot" in str(reasons)
    assert reasons.suggestions[-1].divergence < 0.5 * reasons.divergence
    shapes = product_shapes(hostile)
    timed = measure_timings(shapes.values(), "onnxruntime", 1, measure=fake)
    budget = 0.3 * reasons.divergence
    tuned = ptq.tune(hostile, DATA, held_out=HELD, kl=budget, timings=timed, progress=False)
    assert {"blocks.1.mlp.fc2", scores} & {name for name, form in tuned.point.forms.items() if form == "float"}
    assert tuned.point.counts()["float"] <= 4


def test_timings_come_from_a_file_of_this_model(tmp_path, prepared, cache, timings):
    path = tmp_path / "cpu.json"
    path.write_text(timings.to_json())
    assert load_timings(path) == timings
    assert not timings.elsewhere
    other = ptq.tune(prepared, DATA, held_out=HELD, kl=1.0, timings=path, cache=cache, progress=False)
    assert other.point.takes == tune(prepared, cache, timings, kl=1.0).point.takes
    path.write_text(timings.to_json().replace(timings.machine, "another"))
    assert "of another machine" in tune(prepared, cache, path, kl=1.0).report()
    path.write_text(timings.to_json().replace("17", "18"))
    with pytest.raises(
        ptq.PTQError, match=r"tune: timings: expected a .*, got \d+ others, of tiny; measure this model"
    ):
        tune(prepared, cache, path, kl=1.0)
    path.write_text("{}")
    with pytest.raises(ptq.PTQError, match="expected a field target, got none"):
        load_timings(path)


@pytest.mark.parametrize("is_weight", [True, False])
def test_products_are_timed_in_float_and_as_integers(is_weight):
    linear = ProductShapes("linear", (1, 4, 16), (8, 16), True)
    shapes = linear if is_weight else ProductShapes("matmul", (1, 2, 4, 16), (1, 2, 16, 8), False)
    assert all(0 < seconds < math.inf for seconds in measure_branches(shapes, BRANCHES))


def test_no_session_spins_while_the_next_one_is_timed(monkeypatch):
    """With threads that spin between runs a product of int8 was timed at a third, its twin at three times its time."""
    opened = []

    def noted(model, threads=0, options=None):
        opened.append(options)
        return open_model(model, threads, options)

    monkeypatch.setattr(product_timing, "open_model", noted)
    measure_branches(ProductShapes("linear", (2, 8), (4, 8), True), BRANCHES)
    stops = [options.get_session_config_entry("session.force_spinning_stop") for options in opened]
    assert stops == ["1", "1", "1"]


REFUSED = {
    "a budget that float has not": (
        {"agreement": 1.01},
        "agreement: expected above 0 and at most 1, which float itself",
    ),
    "no budget": ({}, "budget: expected one of agreement, kl, top1_drop, limit, kl_added, got none"),
    "two budgets": ({"kl": 1.0, "agreement": 0.9}, "got agreement and kl"),
    "labels of another length": ({"kl": 1.0, "labels": [0, 1]}, "labels: expected 12, one of each image, got shape"),
    "top-1 without labels": ({"top1_drop": 0.1}, "top1_drop: expected labels of the images, got none"),
    "images that calibration sees": (
        {"kl": 1.0, "held_out": DATA},
        "held_out: expected 8 images or more .*, got 0 of 8",
    ),
    "too few images": ({"kl": 1.0, "held_out": None}, "held_out: expected 8 images or more .*, got 4 of 8"),
    "a form that is none": (
        {"kl": 1.0, "forms": ["int9"]},
        "form: expected float, exact, uniform, or bits such as w8a8",
    ),
    "float alone": ({"kl": 1.0, "forms": ["float"]}, "forms: expected one that is quantized, got float"),
    "a target without it": (
        {"kl": 1.0, "target": "tensorrt", "forms": ["w4a4"]},
        "target tensorrt: expected activations of 8 bits, got w4a4",
    ),
    "a target without timings": (
        {"kl": 1.0, "target": "openvino", "forms": ["w8a8"]},
        "target openvino: expected timings of its products",
    ),
    "no target": ({"kl": 1.0, "target": "onnx"}, "tune: target: expected one of onnxruntime"),
    "no quantity": ({"kl": 1.0, "minimize": "speed"}, "tune: minimize: expected one of time, size, average bits"),
    "another argument": ({"kl": 1.0, "sed": 0}, "tune: sed: expected an argument of calibrate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_is_refused_in_one_sentence(prepared, case):
    asked, message = REFUSED[case]
    with pytest.raises(ptq.PTQError, match=message):
        ptq.tune(prepared, DATA, **({"held_out": HELD, "progress": False} | asked))


def test_a_budget_that_nothing_quantized_keeps_is_refused(prepared, cache, timings):
    with pytest.raises(ptq.PTQError, match=r"budget: expected a quantized model with KL of 1e-30, got .* at best"):
        ptq.tune(prepared, DATA, held_out=HELD, kl=1e-30, timings=timings, forms=["w8a8"], progress=False)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["swin", "hybrid"])
def test_other_families_end_with_a_plan_or_a_sentence(name):
    torch.manual_seed(0)
    if name == "swin":
        arguments = {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 24,
            "depths": (1, 1),
            "num_heads": (1, 2),
        }
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **arguments).eval()
    else:
        model = timm.create_model("mobilevit_xxs", num_classes=5).eval()
    size = 32 if name == "swin" else 64
    images, held = (torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    prepared = ptq.prepare_fx(model, ptq.recipes.best().with_search(n=4, rounds=1, max_shift=2), images[:1])
    try:
        tuned = ptq.tune(prepared, images, held_out=held, agreement=0.5, progress=False)
    except ptq.PTQError as error:
        if "nothing pays" in str(error):  # all of it is faster in float here: a sentence, and no model
            return
        raise
    assert tuned.budget.holds(tuned.point)
    assert torch.isfinite(ptq.convert_fx(tuned.prepared)(held)).all()
    assert "images that calibration has not seen" in tuned.report()
