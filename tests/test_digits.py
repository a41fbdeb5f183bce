"""The embedded digits: the split, the shipped checkpoint, and the script that trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scripts import load_script

from ptq4vit_fx import PTQError
from ptq4vit_fx.tools.digits import build_model, load_digits_images, load_digits_model

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_digits_vit.py"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("tqdm")
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def train_part():
    return load_digits_images("train")


@pytest.fixture(scope="module")
def test_part():
    return load_digits_images("test")


def test_split_is_disjoint_and_complete(train_part, test_part):
    for (images, labels), count in ((train_part, 1297), (test_part, 500)):
        assert images.shape == (count, 1, 16, 16)
        assert images.dtype == torch.float32
        assert (float(images.min()), float(images.max())) == (-1, 1)
        assert labels.shape == (count,)
        assert labels.dtype == torch.int64
        assert set(labels.tolist()) == set(range(10))
    train_rows, test_rows = ({image.numpy().tobytes() for image in images} for images, _ in (train_part, test_part))
    assert not train_rows & test_rows


def test_unknown_split_is_one_sentence():
    with pytest.raises(PTQError, match="expected 'train' or 'test'"):
        load_digits_images("val")  # type: ignore[arg-type]


def test_shipped_checkpoint_reads_98_percent_of_the_test_images(script, test_part):
    assert script.accuracy(load_digits_model(), *test_part) > 0.98


@pytest.mark.parametrize("kind", ["missing", "not safetensors", "another model"])
def test_wrong_weights_are_one_sentence(tmp_path, kind):
    path = tmp_path / "weights.safetensors"
    if kind == "not safetensors":
        path.write_text("not a checkpoint")
    if kind == "another model":
        save_file({**build_model().state_dict(), "head.bias": torch.zeros(11)}, path)
    with pytest.raises(PTQError, match="expected a safetensors checkpoint of the digits model") as error:
        load_digits_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_augment_keeps_shape_and_range_and_follows_the_seed(script, train_part):
    images = train_part[0][:256]
    before = images.clone()
    torch.manual_seed(3)
    first = script.augment(images)
    second = script.augment(images)
    torch.manual_seed(3)
    assert torch.equal(script.augment(images), first)
    assert not torch.equal(second, first)
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert float(first.abs().max()) < 1.5
    assert abs(float(first.mean() - images.mean())) < 0.1


def test_training_runs_and_follows_the_seed(script, train_part, monkeypatch):
    monkeypatch.setattr(script, "EPOCHS", 2)
    monkeypatch.setattr(script, "WARM_UP_EPOCHS", 1)
    images, labels = (part[:64] for part in train_part)
    states = []
    for _ in range(2):
        torch.manual_seed(script.SEED)
        states.append(script.train(images, labels).state_dict())
    assert states[0].keys() == build_model().state_dict().keys()
    assert all(bool(value.isfinite().all()) for value in states[0].values())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
