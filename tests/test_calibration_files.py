"""What a calibration may hold: files with a bit flipped, with impossible values, of other weights, of before."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.calibrating.fit import WEIGHTS_FINGERPRINT
from ptq4vit_fx.inputs.sealed_tensors import sealed
from ptq4vit_fx.quantizers import TwinParams, UniformParams

QUICK = ptq.recipes.ptq4vit().with_search(n=4, rounds=1)
TENSOR, CHANNELS, HEADS = "head:lhs", "head:rhs", "blocks.0.attn.matmul_qk:lhs"
SOFTMAX, GELU = "blocks.0.attn.matmul_av:lhs", "blocks.0.mlp.fc2:lhs"


@pytest.fixture(scope="module")
def prepared(small_vit, small_images):
    graph_module = ptq.prepare_fx(small_vit, QUICK, small_images[:1])
    ptq.calibrate(graph_module, small_images, progress=False)
    return graph_module


@pytest.fixture(scope="module")
def saved(prepared, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "scales.safetensors"
    prepared.calibration.save(path)
    return path


def content(path):
    """Return the tensors of a file, and its texts without the digest."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        return tensors, {key: text for key, text in file.metadata().items() if key != "digest"}


def load(data, tmp_path):
    path = tmp_path / "changed.safetensors"
    path.write_bytes(data)
    return ptq.Calibration.load(path)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.data())
def test_every_flipped_bit_is_refused(saved, tmp_path_factory, data):
    whole = bytearray(saved.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ptq.PTQError, match=r"^Calibration\.load: .*changed\.safetensors.*calibrate again"):
        load(whole, tmp_path_factory.mktemp("flipped"))


def test_what_is_cut_off_appended_added_removed_or_renamed_is_refused(saved, tmp_path):
    whole, (tensors, texts) = saved.read_bytes(), content(saved)
    with safe_open(saved, "pt") as file:
        told = file.metadata()
    some, other = "head:lhs/scale", "blocks.0.attn.qkv:lhs/scale"
    for data in (
        *(whole[:cut] for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1)),
        whole + b"\0",
        save(tensors | {"more:lhs/scale": torch.ones(())}, told),
        save({name: tensor for name, tensor in tensors.items() if name != some}, told),
        save(tensors | {some: tensors[other], other: tensors[some]}, told),
        save(tensors | {some: tensors[some].view(1)}, told),
        save(tensors, told | {"note": "hello"}),
        save(tensors, texts | {"digest": "0" * 64}),
        save(tensors, texts),
    ):
        with pytest.raises(ptq.PTQError, match=r"changed\.safetensors: expected"):
            load(data, tmp_path)


def test_the_order_of_tensors_and_texts_is_no_change(saved, tmp_path):
    with safe_open(saved, "pt") as file:
        told = file.metadata()
    tensors, _ = content(saved)
    backwards = save(dict(reversed(tensors.items())), dict(reversed(told.items())))
    assert load(backwards, tmp_path).fingerprint() == ptq.Calibration.load(saved).fingerprint()


def test_a_file_of_before_loads_with_a_warning(saved, tmp_path, prepared):
    tensors, texts = content(saved)
    with pytest.warns(ptq.PTQWarning, match=r"changed\.safetensors has no digest.*save it again"):
        loaded = load(save(tensors, texts | {"format": "ptq4vit_fx calibration 1"}), tmp_path)
    ptq.load_calibration(prepared, loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.save(tmp_path / "again.safetensors")
        again = ptq.Calibration.load(tmp_path / "again.safetensors")
    assert again.fingerprint() == prepared.calibration.fingerprint()
    assert again.provenance == prepared.calibration.provenance


IMPOSSIBLE = [
    *((TENSOR, lambda s, v=v: UniformParams(torch.tensor(v)), "normal positive scales") for v in (-1.0, 0.0, 1e38)),
    *((TENSOR, lambda s, v=v: UniformParams(torch.tensor(v)), "normal positive scales") for v in (1e-45, 1e-39)),
    (TENSOR, lambda s: UniformParams(s.scale * float("nan")), "normal positive scales, .* got nan;"),
    (TENSOR, lambda s: UniformParams(s.scale * float("inf")), "normal positive scales, .* got inf;"),
    (CHANNELS, lambda s: UniformParams(s.scale - s.scale[2], 0), "normal positive scales, .* got -?.* to "),
    *((TENSOR, lambda s, t=t: UniformParams(s.scale.to(t)), "float32 scales") for t in (torch.half, torch.float64)),
    (TENSOR, lambda s: UniformParams(s.scale.int()), "float32 scales, got torch.int32"),
    (TENSOR, lambda s: UniformParams(s.scale[None]), r"a scale of shape \(\), got shape \(1,\)"),
    (TENSOR, lambda s: UniformParams(torch.ones(2), -3), r"a scale of shape \(\), got shape \(2,\), axis -3"),
    (CHANNELS, lambda s: UniformParams(s.scale[:, None], 0), r"got shape \(5, 1\), axis 0"),
    (CHANNELS, lambda s: UniformParams(s.scale, None), r"got shape \(5,\), axis None"),
    (CHANNELS, lambda s: UniformParams(s.scale, 1), "scales along the axis 0, got along 1"),
    (HEADS, lambda s: UniformParams(s.scale, 0), "scales along the axis -3, got along 0"),
    (HEADS, lambda s: UniformParams(torch.ones(0), -3), "float32 scales, got torch.float32 of shape"),
    (SOFTMAX, lambda s: TwinParams(s.coarse_scale, s.fine_scale), r"a coarse scale of 2\^m fine scales"),
    (SOFTMAX, lambda s: TwinParams(s.fine_scale * 1.5, s.coarse_scale), r"a coarse scale of 2\^m fine scales"),
    (SOFTMAX, lambda s: TwinParams(s.fine_scale * 2, s.coarse_scale * 2), "1/128, for values up to 1"),
    (SOFTMAX, lambda s: TwinParams(-s.fine_scale, -s.coarse_scale), "normal positive scales"),
    (GELU, lambda s: TwinParams(s.fine_scale / 64, s.coarse_scale), "steps down to -0.17"),
    (GELU, lambda s: TwinParams(s.fine_scale.view(1), s.coarse_scale), r"a scale of shape \(\)"),
]


@pytest.mark.parametrize(("site", "made", "said"), IMPOSSIBLE)
def test_impossible_scales_are_refused_by_hand_in_files_and_in_checkpoints(
    prepared, saved, small_vit, small_images, tmp_path, site, made, said
):
    calibration = prepared.calibration
    impossible = replace(calibration, params=calibration.params | {site: made(calibration.params[site])})
    with pytest.raises(ptq.PTQError, match=rf"load_calibration: .*{site}.*: expected .*{said}"):
        ptq.load_calibration(prepared, impossible)
    with pytest.raises(ptq.PTQError, match=rf"save calibration: .*{site}.*: expected .*{said}"):
        impossible.save(tmp_path / "none.safetensors")
    assert not list(tmp_path.iterdir())
    tensors, texts = content(saved)
    record = json.loads(texts["record"])
    record["axes"][site] = impossible.params[site].axis
    tensors |= {f"{site}/{role}": x for role, x in impossible.params[site].tensors().items()}
    path = tmp_path / "scales.safetensors"
    path.write_bytes(sealed(tensors, texts | {"record": json.dumps(record)}))
    with pytest.raises(ptq.PTQError, match=rf"Calibration.load: .*scales.safetensors: {site}.*: expected .*{said}"):
        ptq.Calibration.load(path)
    with pytest.raises(ptq.PTQError, match=rf"{site}.*: expected .*{said}"):
        ptq.calibrate(prepared, small_images, checkpoint=path, progress=False)


@pytest.mark.parametrize(
    ("site", "params", "said"),
    [
        (HEADS, UniformParams(torch.ones(3), -3), r"scales of shape \(2,\), axis -3, got shape \(3,\), axis -3"),
        (HEADS, UniformParams(torch.tensor(1.0)), r"scales of shape \(2,\), axis -3, got shape \(\), axis None"),
        (CHANNELS, UniformParams(torch.ones(4), 0), r"scales of shape \(5,\), axis 0, got shape \(4,\), axis 0"),
    ],
)
def test_scales_that_only_the_model_rules_out(prepared, small_images, tmp_path, site, params, said):
    other = replace(prepared.calibration, params=prepared.calibration.params | {site: params})
    other.save(tmp_path / "scales.safetensors")
    with pytest.raises(ptq.PTQError, match=rf"load_calibration: site {site}: expected .*{said}"):
        ptq.load_calibration(prepared, ptq.Calibration.load(tmp_path / "scales.safetensors"))
    with pytest.raises(
        ptq.PTQError, match=rf"calibrate: checkpoint .*scales.safetensors: site {site}: expected {said}"
    ):
        ptq.calibrate(prepared, small_images, checkpoint=tmp_path / "scales.safetensors", progress=False)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("distances",), [], "record.distances: expected an object"),
        (("distances", "head"), "small", r"record.distances.head: expected a list, got 'small'"),
        (("distances", "head"), [1.0], "record.distances.head: expected a list of 2"),
        (("distances", "heads"), [1.0, 1.0], "heads: expected a site or a product of the plan beside it"),
        (("snr", "head:lhs"), None, "record.snr.head:lhs: expected a number, got None"),
        (("seconds", "elsewhere"), 1.0, "elsewhere: expected a site or a product"),
        (("axes",), {}, "expected an axis beside its tensors, got none"),
        (("axes", "head:rhs"), "0", "record.axes.head:rhs: expected an integer or null, got '0'"),
        (("without_gradient",), [3], r"record.without_gradient\[0\]: expected text, got 3"),
        (("without_gradient",), ["elsewhere"], "elsewhere: expected a site or a product"),
        (("provenance",), "none", "record.provenance: expected an object"),
        (("more",), 1, "record._Record: expected fields that this version knows, got more"),
    ],
)
def test_a_malformed_record_is_refused_where_it_is_malformed(saved, tmp_path, path, value, said):
    tensors, texts = content(saved)
    record = json.loads(texts["record"])
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ptq.PTQError, match=rf"^Calibration.load: .*changed.safetensors: .*{said}"):
        load(sealed(tensors, texts | {"record": json.dumps(record)}), tmp_path)


def test_a_missing_record_another_format_and_a_pipe_are_refused(saved, tmp_path):
    tensors, texts = content(saved)
    del texts["record"]
    with pytest.raises(ptq.PTQError, match="expected a plan and a record, got "):
        load(sealed(tensors, texts), tmp_path)
    with pytest.raises(ptq.PTQError, match="expected ptq4vit_fx calibration 2, got 'of tomorrow'"):
        load(sealed(tensors, texts | {"format": "of tomorrow"}), tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path, got in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), (tmp_path / "none", "no such file")):
        with pytest.raises(ptq.PTQError, match=f"written by Calibration.save, got {got}; check the path"):
            ptq.Calibration.load(path)


def test_a_calibration_of_other_weights_is_refused(prepared, small_vit, small_images, saved):
    other = ptq.prepare_fx(small_vit, QUICK, small_images[:1])
    ptq.load_calibration(other, ptq.Calibration.load(saved))
    with torch.no_grad():
        nn.init.ones_(other.get_parameter("head.bias"))
    with pytest.raises(ptq.PTQError, match=r"expected a calibration of these weights .*, got one of others"):
        ptq.load_calibration(other, ptq.Calibration.load(saved))
    by_hand = ptq.Calibration(prepared.calibration.plan, prepared.calibration.params)
    assert WEIGHTS_FINGERPRINT not in by_hand.provenance
    ptq.load_calibration(other, by_hand)
    with pytest.raises(ptq.PTQError, match=r"expected a QuantPlan and a dictionary, .*got QuantPlan and list"):
        ptq.Calibration(prepared.plan, [])  # type: ignore[arg-type]
    with pytest.raises(ptq.PTQError, match=r"expected a Calibration, got str; read a file with Calibration\.load"):
        ptq.load_calibration(other, str(saved))  # type: ignore[arg-type]


def test_a_provenance_that_no_file_can_hold_is_refused_before_anything_is_written(prepared, tmp_path):
    deep: dict = {}
    for _ in range(99):
        deep = {"in": deep}
    for fact in (torch.ones(2), {1, 2}, deep):
        made = prepared.calibration.with_provenance({"fact": fact})
        with pytest.raises(ptq.PTQError, match=r"^save calibration: .*expected .*JSON"):
            made.save(tmp_path / "scales.safetensors")
    assert not list(tmp_path.iterdir())
