"""int8 beside float: the figures on arrays that have known ones, and models and files on both sides."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.metadata import provenance
from ptq4vit_fx.export.proof.against_float import Share
from ptq4vit_fx.export.proof.float_figures import against_float, closeness
from ptq4vit_fx.export.proof.latency import measure_latency
from ptq4vit_fx.export.proof.runtime import open_session


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    # Wilson's interval as in Brown, Cai and DasGupta, Statistical Science 16 (2001), and by statsmodels
    # (proportion_confint(count, of, method="wilson")).
    [(64, 64, 0.94338, 1.0), (63, 64, 0.91667, 0.99724), (0, 10, 0.0, 0.27754), (5, 10, 0.23659, 0.76341)],
)
def test_interval_of_a_share(count, of, low, high):
    assert Share(count, of).interval == pytest.approx((low, high), abs=2e-5)


def test_a_share_of_nothing_says_nothing():
    assert Share(0, 0).interval == (0.0, 1.0)
    assert math.isnan(Share(0, 0).value)


def logits(*rows):
    return {"logits": np.array(rows, np.float32)}


def test_classes():
    mine = logits([2, 0, 0], [0, 2, 0], [0, 0, 2], [5, 0, 0])
    theirs = logits([2, 0, 0], [1, 0, 0], [0, 0, 1.9], [1, 0, 0])
    found = against_float(mine, theirs, names=["a", "b", "c", "d"])
    assert (found.kind, found.same_class, found.score) == ("classes", Share(3, 4), 0.75)
    assert not found.ok()
    assert found.ok(0.75)
    p = [np.exp(x["logits"].astype(np.float64)) for x in (mine, theirs)]
    p = [x / x.sum(1, keepdims=True) for x in p]
    assert found.divergence == pytest.approx((p[0] * np.log(p[0] / p[1])).sum(1).mean())
    noise = ((mine["logits"] - theirs["logits"]) ** 2).sum()
    assert found.closeness.snr == pytest.approx(10 * math.log10((mine["logits"] ** 2).sum() / noise), abs=1e-4)
    assert found.worst.image == 1  # its class is wrong; the probabilities of the last one are farther off
    assert (found.worst.name, found.worst.classes) == ("b", (1, 0))
    assert "3 of 4 images: 75.0% (95%: 30.1% to 95.4%)" in str(found)
    assert "worst image 1 (b): class 0 instead of 1" in str(found)


def test_equal_outputs_are_ok_whatever_they_are():
    for shape in ((5, 7), (5, 1), (5, 3, 4, 4)):
        x = {"logits": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
        found = against_float(x, x)
        assert (found.score, found.closeness.relative_error, found.closeness.snr) == (1.0, 0.0, math.inf)
        assert found.kind == ("classes" if shape == (5, 7) else "values")


def test_embeddings_are_searched_among_floats():
    generator = np.random.default_rng(0)
    mine = generator.normal(size=(40, 16)).astype(np.float32)
    near = mine + generator.normal(size=mine.shape).astype(np.float32) * 0.02
    found = against_float({"pooler_output": mine}, {"pooler_output": near})
    assert (found.kind, found.decided) == ("embeddings", "by the name pooler_output")
    assert found.recall == Share(40, 40)
    assert 0.9 < found.neighbours <= 1.0
    assert found.same_class is None
    assert found.ok()
    swapped = near.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    broken = against_float({"x": mine}, {"x": swapped}, kind="embeddings")
    assert broken.recall == Share(38, 40)
    assert broken.score < 0.96
    assert broken.worst.image in (3, 4)
    assert broken.neighbours < found.neighbours
    by_hand = [np.argsort(-(a @ (mine / np.linalg.norm(mine, axis=1, keepdims=True)).T)) for a in (mine, near)]
    nearest = [[[i for i in row if i != own][:5] for own, row in enumerate(rows)] for rows in by_hand]
    common = sum(len(set(a) & set(b)) for a, b in zip(*nearest, strict=True))
    assert found.neighbours == pytest.approx(common / 200)


def test_equal_images_are_each_others_neighbours():
    x = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    assert against_float({"x": x}, {"x": x}, kind="embeddings").recall == Share(4, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_no_agreement(bad):
    mine = logits([2, 0, 0], [0, 2, 0])
    theirs = logits([2, 0, 0], [0, bad, 0])
    found = against_float(mine, theirs)
    assert found.same_class == Share(1, 2)
    assert found.worst.image == 1
    values = against_float(mine, theirs, kind="values")
    assert values.score == 0.5
    assert values.closeness.relative_error == math.inf


def test_a_mask_on_both_sides_is_no_difference():
    x = logits([2, -np.inf, 0], [0, -np.inf, 1])
    found = against_float(x, x)
    assert (found.score, found.divergence, found.closeness.cosine) == (1.0, 0.0, 1.0)


def test_what_the_model_says_and_what_the_user_says():
    x = {"logits": np.ones((2, 4), np.float32)}
    assert against_float(x, x, says="embeddings").kind == "embeddings"
    assert against_float(x, x, says="embeddings", kind="classes").kind == "classes"
    with pytest.raises(ptq.PTQError, match="kind: expected one of classes, embeddings, values, got 'class'"):
        against_float(x, x, kind="class")  # type: ignore[arg-type]
    with pytest.raises(ptq.PTQError, match=r'as classes have it, got .*; pass kind="values"'):
        against_float({"y": x["logits"][:, :1]}, {"y": x["logits"][:, :1]}, kind="classes")


def test_of_several_outputs_the_logits_count():
    generator = np.random.default_rng(0)
    mine = {"features": generator.normal(size=(3, 4, 8)), "logits": generator.normal(size=(3, 5))}
    theirs = {"logits": mine["logits"], "features": mine["features"] * 2}
    found = against_float(mine, theirs)
    assert (found.output, found.score) == ("logits", 1.0)
    assert found.others["features"].relative_error == pytest.approx(1.0)
    assert found.others["features"].cosine == pytest.approx(1.0)
    assert json.loads(json.dumps(found.to_dict()))["same_class"]["interval"][1] == 1.0


def test_closeness_of_zeros():
    zeros, ones = np.zeros((2, 3)), np.ones((2, 3))
    assert closeness(zeros, zeros).relative_error == 0.0
    assert closeness(zeros, ones).relative_error == math.inf
    assert closeness(ones, zeros).cosine == 0.0


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_vit, small_images, small_converted):
    folder = tmp_path_factory.mktemp("files")
    ptq.export_onnx(small_converted, folder / "int8.onnx", small_images[:1])
    batch = ({0: torch.export.Dim("batch", min=1)},)
    torch.onnx.export(
        small_vit, (small_images[:2],), folder / "float.onnx", dynamo=True, dynamic_shapes=batch, verbose=False
    )
    return folder


def test_models_and_files_on_both_sides(files, small_vit, small_images, small_converted):
    before = copy.deepcopy(small_vit.state_dict())
    found = [
        ptq.compare_float(quantized, reference, small_images)
        for quantized in (small_converted, files / "int8.onnx")
        for reference in (small_vit, files / "float.onnx")
    ]
    with torch.no_grad():
        same = int((small_vit(small_images).argmax(1) == small_converted(small_images).argmax(1)).sum())
    assert all(one.same_class == Share(same, 12) for one in found)
    assert all(one.closeness.snr == pytest.approx(found[0].closeness.snr, abs=0.5) for one in found)
    assert 15 < found[0].closeness.snr < 60
    assert [one.decided for one in found] == [*["as the model says", "by the shape (images, 5)"] * 2]
    assert all(torch.equal(value, before[name]) for name, value in small_vit.state_dict().items())


def test_a_model_in_training_is_compared_as_it_is_deployed(small_vit, small_images, small_converted):
    model = copy.deepcopy(small_vit).train()
    found = ptq.compare_float(small_converted, model, small_images, images=4, unseen=True)
    assert found.images == 4
    assert model.training
    assert "images that calibration has not seen" in str(found)


def test_a_model_without_a_head_gives_embeddings(small_images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 6))
    converted = ptq.quantize(model, small_images, progress=False)
    assert ptq.compare_float(converted, model, small_images).kind == "classes"
    setattr(model, "num_classes", 0)  # noqa: B010 - as timm's models have it
    found = ptq.compare_float(converted, model, small_images)
    assert found.kind == "embeddings"
    assert found.recall.of == 12
    assert "recall@1" in str(found)


def test_another_model_is_refused(files, small_images, small_vit, small_converted):
    other = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    with pytest.raises(ptq.PTQError, match="compare_float: output logits: expected float's shape"):
        ptq.compare_float(small_converted, other, small_images)
    with pytest.raises(ptq.PTQError, match="compare_float: VisionTransformer: expected a model at stage 'converted'"):
        ptq.compare_float(small_vit, small_vit, small_images)
    with pytest.raises(ptq.PTQError, match="expected a forward that runs on these images"):
        ptq.compare_float(small_converted, nn.Linear(3, 3), small_images)
    with pytest.raises(ptq.PTQError, match="expected shape"):
        ptq.compare_float(files / "int8.onnx", small_vit, torch.randn(2, 3, 20, 20))
    with pytest.raises(ptq.PTQError, match=r"int8\.onnx\.missing"):
        ptq.compare_float(files / "int8.onnx.missing", small_vit, small_images)


def test_the_float_file_computes_the_float_model(tmp_path, small_vit, small_images):
    path = tmp_path / "float.onnx"
    facts = {"preprocessing": {"mean": [0.5]}}
    assert export_float(small_vit, path, small_images[:1], opset=17, facts=facts) == path.stat().st_size
    session = open_session(path)
    assert [entry.name for entry in (*session.get_inputs(), *session.get_outputs())] == ["image", "logits"]
    with torch.no_grad():
        wanted = small_vit(small_images).numpy()
    np.testing.assert_allclose(session.run(None, {"image": small_images.numpy()})[0], wanted, rtol=1e-4, atol=1e-5)
    assert provenance(session.get_modelmeta().custom_metadata_map, "read", str(path)) == facts
    assert {domain.version for domain in onnx.load(path).opset_import if not domain.domain} == {17}


def test_latency_is_of_both_files_in_turn(tmp_path, files, small_vit, small_images):
    found = measure_latency(files / "int8.onnx", files / "float.onnx", seconds=0)
    assert (found.images, found.rounds) == (1, 5)
    assert 0 < found.low <= found.ratio <= found.high
    assert found.milliseconds > 0 < found.float_milliseconds
    export_float(small_vit, tmp_path / "four.onnx", small_images[:1], batch=4)
    slower = measure_latency(tmp_path / "four.onnx", files / "float.onnx", seconds=0)
    assert slower.images == 4
    assert "times float here: 4 images " in str(slower)
    with pytest.raises(ptq.PTQError, match=r"none\.onnx"):
        measure_latency(files / "int8.onnx", tmp_path / "none.onnx")
