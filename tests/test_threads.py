"""Several threads may quantize at once, while others run models: a server that quantizes per request does both."""

from __future__ import annotations

import copy
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest
import torch
from torch import nn
from torch.nn.modules.module import Module

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.passes.graph.silence import muted_stdout, silence
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.torch_state import (
    full_precision_convolutions,
    independent_of_caller,
    intra_op_threads,
    single_threaded_pool,
)

QUICK = ptq.recipes.ptq4vit().with_search(n=5, rounds=1)


class OwnViT(nn.Module):
    """Behind torch.export's tracer: nn.MultiheadAttention is several products."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1)


def global_state():
    return (
        Module.__call__,
        Module.__getattr__,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.deterministic,
        sys.stderr,
        sys.stdout,
        warnings.showwarning,
        list(warnings.filters),
    )


@pytest.fixture(autouse=True)
def everything_is_given_back():
    before = global_state()
    yield
    assert global_state() == before


def together(*calls):
    """Return what each call gives, all of them started at the same moment."""
    started = threading.Barrier(len(calls))

    def begin(call):
        started.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(begin, call) for call in calls]]


def test_models_are_quantized_at_once_as_one_after_the_other(small_vit, small_images, tmp_path):
    models = [small_vit, OwnViT(0).eval()]

    def quantized(model, path):
        converted = ptq.quantize(model, small_images, qconfig_mapping=QUICK, progress=False)
        ptq.export_onnx(converted, path, small_images)
        file = onnx.load(path)
        del file.metadata_props[:]  # they have seconds
        return converted.calibration.fingerprint(), file.SerializeToString(deterministic=True)

    alone = [quantized(model, tmp_path / f"alone{i}.onnx") for i, model in enumerate(models)]
    files = [tmp_path / f"together{i}.onnx" for i in range(len(models))]
    at_once = together(*(lambda m=m, f=f: quantized(m, f) for m, f in zip(models, files, strict=True)))
    assert at_once == alone


def test_errors_of_one_thread_are_its_own(small_vit, small_images):
    class Branches(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    def refused():
        with pytest.raises(ptq.PTQError, match="control flow"):
            ptq.prepare_fx(Branches(), QUICK, small_images[:1])
        return "refused"

    def prepared():
        return len(plan_of(ptq.prepare_fx(small_vit, QUICK, small_images[:1])).ops)

    assert together(refused, prepared, refused, prepared) == ["refused", 14, "refused", 14]


@pytest.mark.parametrize("closed", [False, True], ids=["torch.fx", "torch.export"])
def test_a_model_that_serves_meanwhile_computes_as_always(closed, small_vit, small_images, tmp_path):
    """Tracers replace nn.Module.__call__ and __getattr__ for all: of another thread's models they would make nodes."""
    server, model = OwnViT(2).eval(), OwnViT(0).eval() if closed else small_vit
    with torch.no_grad():
        expected = server(small_images)
    done, outputs = threading.Event(), []

    def serve():
        with torch.no_grad():
            while not done.is_set():
                outputs.append(server(small_images))
                time.sleep(0)
        return len(outputs)

    def work():
        try:
            converted = ptq.quantize(model, small_images[:2], qconfig_mapping=QUICK, progress=False)
            ptq.export_onnx(converted, tmp_path / "model.onnx", small_images)
        finally:
            done.set()

    served, _ = together(serve, work)
    assert served > 10
    for output in outputs:  # nn.MultiheadAttention has a fast path, which is off meanwhile
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_one_prepared_model_is_calibrated_by_one_thread(small_vit, small_images):
    prepared = ptq.prepare_fx(small_vit, QUICK, small_images[:1])
    entered, leave = threading.Event(), threading.Event()

    def batches():
        entered.set()
        leave.wait(60)
        yield small_images

    def first():
        return ptq.calibrate(prepared, batches(), progress=False).fingerprint()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first)
        assert entered.wait(60)
        other = copy.deepcopy(prepared)
        calibration = ptq.calibrate(other, small_images, progress=False)
        for call in (
            lambda: ptq.calibrate(prepared, small_images, progress=False),
            lambda: ptq.convert_fx(prepared),
            lambda: ptq.load_calibration(prepared, calibration),
        ):
            with pytest.raises(ptq.PTQError, match=r"another call of calibrate works on; .*copy\.deepcopy\(prepared\)"):
                call()
        mine = calibration.fingerprint()
        leave.set()
        assert running.result() == mine
    assert ptq.calibrate(prepared, small_images, progress=False).fingerprint() == mine  # free again


def test_settings_of_the_process_are_given_back_by_the_last(small_images):
    torch.set_default_dtype(torch.float64)
    try:
        inside, first_left = threading.Barrier(2), threading.Event()

        def first():
            with independent_of_caller():
                inside.wait()
            first_left.set()

        def second():
            with independent_of_caller():
                inside.wait()
                assert first_left.wait(60)
                return torch.ones(1).dtype

        assert together(first, second)[1] is torch.float32
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_an_exporter_has_found_is_not_left_behind():
    """torch.export gives back at its end the flags of cuDNN that it has found at its start, which were others' then."""
    held, found, left = threading.Event(), threading.Event(), threading.Event()

    def calibrates():
        with full_precision_convolutions():
            held.set()
            assert found.wait(60)
        left.set()

    def exports():
        assert held.wait(60)
        with independent_of_caller():
            flags = torch.backends.cudnn.set_flags(False)
            found.set()
            assert left.wait(60)
            torch.backends.cudnn.set_flags(*flags)

    together(calibrates, exports)  # the fixture looks at the flags


def test_workers_alone_are_single_threaded():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with single_threaded_pool(2, "test") as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
            seen: list[int] = []
            later = threading.Thread(target=lambda: seen.append(intra_op_threads()))
            later.start()
            later.join()
        assert (seen, torch.get_num_threads()) == ([3], 3)
    finally:
        torch.set_num_threads(before)


def test_what_other_threads_say_while_one_traces_is_heard(capfd):
    said, spoken = threading.Event(), threading.Event()

    def speak():
        assert said.wait(60)
        warnings.warn("mine", UserWarning, stacklevel=1)
        print("to stdout")
        print("to stderr", file=sys.stderr)
        spoken.set()

    def trace_quietly():
        with silence(), muted_stdout():
            warnings.warn("the tracer's", UserWarning, stacklevel=1)
            warnings.warn("ours", ptq.PTQWarning, stacklevel=1)
            print("progress of the exporter")
            print("half a graph", file=sys.stderr)
            said.set()
            assert spoken.wait(60)

    with pytest.warns() as heard:
        together(speak, trace_quietly)
    assert sorted(str(w.message) for w in heard) == ["mine", "ours"]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("to stdout\n", "to stderr\n")


@pytest.mark.parametrize("name", ["call", "self", "torch", "getattr", "device", "model", "slice"])
@pytest.mark.parametrize("exported", [False, True])
def test_parameters_may_have_any_name(name, exported, small_images):
    space: dict[str, type[nn.Module]] = {}
    line = f"flat = this.attention({name}.flatten(2), {name}.flatten(2), {name}.flatten(2))[0][:, :2]"
    line = line if exported else f"flat = {name}.flatten(2)[:, :2]"
    source = f"class Model(nn.Module):\n def forward(this, {name}, image):\n  {line}\n"
    source += "  return this.head(flat + image.mean()).mean(1)"
    exec(source, {"nn": nn}, space)
    model = space["Model"]()
    model.head, model.attention = nn.Linear(256, 5), nn.MultiheadAttention(256, 2, batch_first=True)
    traced = trace(model.eval(), (small_images, small_images))
    with torch.no_grad():
        torch.testing.assert_close(traced(small_images, small_images), model(small_images, small_images))
    prepared = ptq.prepare_fx(model, QUICK, (small_images, small_images))
    ptq.calibrate(prepared, [{name: small_images, "image": small_images}], progress=False)


def test_models_are_as_deep_as_python_lets_them_be(small_vit, small_images, tmp_path):
    """A tracer, a copy and an exporter make several calls for one call of the model's own."""
    model: nn.Module = small_vit
    for _ in range(150):
        model = nn.Sequential(model)
    before = sys.getrecursionlimit()
    converted = ptq.quantize(model.eval(), small_images, qconfig_mapping=QUICK, progress=False)
    ptq.export_onnx(converted, tmp_path / "model.onnx", small_images)
    assert sys.getrecursionlimit() == before
