"""Images for a calibration that do not look like what the model wants: a warning that says what to do, or none."""

from __future__ import annotations

import warnings

import pytest
import torch

import ptq4vit_fx as ptq
from ptq4vit_fx.inputs.items import Input
from ptq4vit_fx.inputs.plausible import Normalization, normalization_of, warn_of_implausible

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def said_of(*inputs: torch.Tensor, normalization: Normalization | None = None) -> list[str]:
    """Return the warnings of data in two batches."""
    wanted = [Input(f"x{n}", f"x{n}", tuple(x.shape[1:]), x.dtype) for n, x in enumerate(inputs)]
    batches = list(zip(*(torch.split(x, 16) for x in inputs), strict=True))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warn_of_implausible(batches, wanted, "calibrate", normalization)
    assert all(issubclass(one.category, ptq.PTQWarning) for one in heard)
    return [str(one.message) for one in heard]


def pictures(count: int = 20) -> torch.Tensor:
    """Values from 0 to 1, (count, 3, 8, 8), with black and white among them."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(1.4).sub(0.2).clamp(0, 1)


def normalized(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor(IMAGENET.mean)[:, None, None]) / torch.tensor(IMAGENET.std)[:, None, None]


GOOD = {
    "normalized": normalized(pictures()),
    "from -1 to 1": pictures() * 2 - 1,
    "noise": torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    "dark": normalized(pictures() * 0.2),
    "token ids": torch.zeros(20, 7, dtype=torch.int64),
    "a spectrogram in dB": torch.full((20, 2, 8, 8), -80.0),
    "vectors": torch.full((20, 9), 1e4),
}


@pytest.mark.parametrize("name", GOOD)
def test_nothing_is_said_of_usual_data(name):
    assert said_of(GOOD[name], normalization=IMAGENET) == []


BAD = {
    "bytes": (pictures() * 255, "look like bytes, not like normalized images; prepare them"),
    "bytes of one channel": ((pictures() * 255)[:, :1], "look like bytes"),
    "not normalized": (pictures(), "not normalized, as the model's own configuration wants it (mean 0.485 0.456 0.406"),
    "one image": (normalized(pictures(1)).expand(20, 3, 8, 8), "all images are equal"),
    "black": (torch.zeros(20, 3, 8, 8), "all images are equal"),
    "nearly nothing": (pictures() * 1e-3 - 0.001, "far from that of normalized images"),
    "normalized twice, from bytes": (normalized(pictures() * 255), "far from that of normalized images"),
    "far away": (normalized(pictures()) - 40, "far from that of normalized images"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusual_data_is_one_warning(name):
    data, sentence = BAD[name]
    (said,) = said_of(data, normalization=IMAGENET)
    assert said.startswith("calibrate: data: ")
    assert sentence in said


def test_images_from_0_to_1_are_right_for_a_model_that_does_not_say_otherwise():
    assert said_of(pictures()) == []
    assert said_of(pictures(), normalization=Normalization((0.0,) * 3, (1.0,) * 3)) == []


def test_few_images_are_said_to_be_few():
    (said,) = said_of(normalized(pictures(15)))
    assert "15 images, fewer than 16: their scales are left to chance; pass 32" in said
    (one,) = said_of(normalized(pictures(1)))
    assert "1 image, fewer" in one


def test_the_image_among_several_inputs_is_looked_at():
    (said,) = said_of(torch.zeros(20, 5, dtype=torch.int64), pictures() * 255, torch.zeros(20, 3, 8, 8))
    assert "look like bytes" in said


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"mean": (0.5,) * 3, "std": [0.5] * 3, "input_size": 9}, Normalization((0.5,) * 3, (0.5,) * 3)),
        ({"mean": (0.5,) * 3}, None),
        ({"mean": (0.5,), "std": (0.0,)}, None),
        ({"mean": ("a",), "std": (1.0,)}, None),
        ({"mean": (0.5, 0.5), "std": (1.0,)}, None),
        ("vit", None),
    ],
)
def test_what_a_model_says_of_its_images(config, found):
    assert normalization_of(type("Model", (), {"pretrained_cfg": config})()) == found
    assert normalization_of(object()) is None


def test_calibrate_warns(small_vit, small_images):
    mapping = ptq.recipes.base_ptq().with_search(n=2, rounds=1)
    prepared = ptq.prepare_fx(small_vit, mapping, small_images[:1])
    with pytest.warns(ptq.PTQWarning, match="calibrate: data: values from 0 to 255.*look like bytes"):
        ptq.calibrate(prepared, (small_images.abs().clamp(max=1) * 255).round(), progress=False)
    with pytest.raises(ptq.PTQError, match=r"expected torch.float32, as in the example, got torch.uint8; preprocess"):
        ptq.calibrate(prepared, (small_images.abs().clamp(max=1) * 255).byte(), progress=False)
