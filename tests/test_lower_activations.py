"""The two branches of a softmax twin whose threshold is below half a coarse step are the quantizer, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphs import model_of
from torch import nn
from torch.fx import Interpreter

import ptq4vit_fx as ptq
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.passes.graph.operators import QUANTIZE
from ptq4vit_fx.quantizers import TwinUniform

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def converted_with_shift(bits, shift):
    model = model_of(lambda module, x: torch.softmax(x @ x.transpose(-2, -1), -1) @ x)
    prepared = ptq.prepare_fx(model, ptq.recipes.ptq4vit(bits, bits).with_search(n=2, rounds=1), X)
    calibration = ptq.calibrate(prepared, X, progress=False, loss=torch.sum)
    (site,) = (key for key, q in calibration.plan.quantizers.items() if isinstance(q, TwinUniform))
    twin = calibration.plan.quantizers[site]
    params = calibration.params | {site: twin.softmax_params(torch.tensor(shift))}
    ptq.load_calibration(prepared, ptq.Calibration(calibration.plan, params))
    return ptq.convert_fx(prepared), twin, params[site]


def sum_of_branches(converted, values):
    """Feed values in the place of the softmax; return what the two branches stand for, added."""
    found = []

    class Feed(Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.target is F.softmax:
                return values
            if n.target is QUANTIZE and any(part in str(n.args[1]) for part in ("fine", "coarse")):
                scale, zero_point = (self.env[argument] for argument in n.args[1:3])
                found.append((result.int() - zero_point.int()).float() * scale)
            return result

    with torch.inference_mode():
        Feed(converted).run(values)
    fine, coarse = found
    assert not (fine.bool() & coarse.bool()).any()
    return fine + coarse


@pytest.mark.parametrize(("bits", "shift"), [(b, s) for b in (2, 3, 4, 6, 8) for s in range(b, 11)])
def test_a_masked_twin_is_the_quantizer(bits, shift):
    converted, twin, params = converted_with_shift(bits, shift)
    threshold = np.float32(twin.threshold(params))
    edges = [np.nextafter(threshold, np.float32(towards)) for towards in (0, 1)]
    steps = np.arange(0, 2 ** (bits - 1) + 1, dtype=np.float32) / 2 ** (bits - 1)
    half_steps = steps[1:] - steps[1] / 2
    values = [0.0, threshold, *edges, *steps, *half_steps, *np.geomspace(1e-6, 1, 400, dtype=np.float32)]
    flat = torch.tensor(np.array(values, np.float32))
    flat = F.pad(flat, (0, -len(flat) % 32)).reshape(-1, 2, 4, 4)
    assert torch.equal(sum_of_branches(converted, flat), twin.fake_quantize(flat, params))


def test_the_file_masks_in_the_same_place(tmp_path):
    converted, _, _ = converted_with_shift(4, 6)
    report = ptq.export_onnx(converted, tmp_path / "model.onnx", X)
    assert report.operators["ThresholdedRelu"] == 1
    assert "Where" not in report.operators
    verified = ptq.verify_onnx(tmp_path / "model.onnx", converted, X)
    assert verified.same_functions.bit_equal == 1.0


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_thresholds_of_the_model_itself(tmp_path, value):
    layer = nn.Linear(16, 4)
    converted = ptq.quantize(
        model_of(lambda module, x: module.layer(F.threshold(x.flatten(1), 0.3, value)), layer=layer),
        X.reshape(6, 1, 4, 4),
        progress=False,
    )
    ptq.export_onnx(converted, tmp_path / "model.onnx", X.reshape(6, 1, 4, 4))
    (out,) = open_session(tmp_path / "model.onnx").run(None, {"image": X.reshape(6, 1, 4, 4).numpy()})
    np.testing.assert_allclose(out, converted(X.reshape(6, 1, 4, 4)).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_equal_reshapes_of_one_tensor(tmp_path):
    model = model_of(lambda module, x: module.layer(x.flatten(1)) + x.flatten(1)[:, :4], layer=nn.Linear(32, 4))
    converted = ptq.quantize(model, X, progress=False)
    ptq.export_onnx(converted, tmp_path / "model.onnx", X)
    (out,) = open_session(tmp_path / "model.onnx").run(None, {"image": X.numpy()})
    np.testing.assert_allclose(out, converted(X).detach().numpy(), rtol=1e-5, atol=1e-6)
