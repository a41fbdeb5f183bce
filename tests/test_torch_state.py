"""Torch's global state is the caller's: no entry point depends on it, and each leaves it as it was."""

from __future__ import annotations

import contextlib

import pytest
import torch

import ptq4vit_fx as ptq
from ptq4vit_fx.torch_state import independent_of_caller


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


STATES = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": default_dtype,
    "meta": lambda: torch.device("meta"),
}


def state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_rng_state().tolist() if torch.get_default_device().type == "cpu" else None,
    )


@pytest.mark.parametrize("name", STATES)
def test_inside_it_is_always_the_same_and_outside_as_before(name):
    with STATES[name]():
        before = state()
        with independent_of_caller():
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            made = torch.ones(2)
            assert (made.dtype, made.device.type) == (torch.float32, "cpu")
            assert not made.is_inference()
        with pytest.raises(KeyError), independent_of_caller():
            raise KeyError
        assert state() == before


QUICK = ptq.recipes.ptq4vit().with_search(n=5, rounds=1)


@pytest.fixture(scope="module")
def calibrated(small_vit, small_images):
    prepared = ptq.prepare_fx(small_vit, QUICK, small_images[:1])
    ptq.calibrate(prepared, small_images, progress=False)
    return prepared


@pytest.mark.parametrize("name", STATES)
def test_every_entry_point_leaves_it(name, small_vit, small_images, calibrated, tmp_path):
    path, bad = tmp_path / "model.onnx", tmp_path / "no such file.onnx"
    with STATES[name]():
        before = state()
        prepared = ptq.prepare_fx(small_vit, QUICK, small_images[:1])
        ptq.load_calibration(calibrated, calibrated.calibration)
        converted = ptq.convert_fx(calibrated)
        ptq.export_onnx(converted, path, small_images[:1])
        ptq.verify_onnx(path, converted, small_images[:2])
        assert state() == before
        for refused in (
            lambda: ptq.prepare_fx(small_vit, QUICK, small_images[:1, :, :9]),
            lambda: ptq.quantize(small_vit, small_images[:0]),
            lambda: ptq.calibrate(prepared, small_images[:0], progress=False),
            lambda: ptq.convert_fx(prepared),
            lambda: ptq.export_onnx(prepared, path, small_images[:1]),
            lambda: ptq.verify_onnx(bad, converted, small_images[:1]),
        ):
            with pytest.raises(ptq.PTQError):
                refused()
            assert state() == before


@pytest.mark.parametrize("name", ["no_grad", "inference_mode", "autocast", "float64", "meta"])
def test_a_calibration_is_the_same_in_any(name, small_vit, small_images, calibrated):
    with STATES[name]():
        prepared = ptq.prepare_fx(small_vit, QUICK, small_images[:1])
        calibration = ptq.calibrate(prepared, small_images, progress=False)
    for key, params in calibrated.calibration.params.items():
        for tensor, expected in zip(calibration.params[key].tensors().values(), params.tensors().values(), strict=True):
            assert torch.equal(tensor, expected)


def test_a_converted_model_computes_the_same_under_autocast(small_converted, small_images):
    expected = small_converted(small_images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(small_converted(small_images), expected)
        assert torch.is_autocast_enabled("cpu")


def test_a_warning_names_the_line_of_the_user(small_vit, small_images):
    mapping = ptq.QConfigMapping().set_module_name("head", QUICK.global_qconfig)
    with pytest.warns(ptq.PTQWarning, match="products stay float") as heard:
        ptq.prepare_fx(small_vit, mapping, small_images[:1])
    assert [warning.filename for warning in heard] == [__file__]
