"""The page of a report: what it says is what was measured, nothing of it is fetched, and nothing in it is obeyed."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
import torch

import ptq4vit_fx as ptq
from ptq4vit_fx.export.float_export import export_float
from ptq4vit_fx.export.metadata import FIGURES_KEY
from ptq4vit_fx.export.report.facts import bits_of, missing_of, repeat_of
from ptq4vit_fx.export.report.seen import levels
from ptq4vit_fx.names import block_and_role
from ptq4vit_fx.plan import FloatOp
from ptq4vit_fx.quantizers import TwinUniform, Uniform, UniformParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_converted, small_vit, small_images):
    """A file, its calibration and the float file."""
    folder = tmp_path_factory.mktemp("report")
    ptq.export_onnx(small_converted, folder / "model.onnx", small_images[:1])
    small_converted.calibration.save(folder / "scales.safetensors")
    export_float(small_vit, folder / "float.onnx", small_images[:1])
    return folder


@pytest.fixture(scope="module")
def whole(folder, small_images):
    """The report with everything that can be measured."""
    reference, names = folder / "float.onnx", [f"{n}.png" for n in range(12)]
    return ptq.report(folder / "model.onnx", folder / "r.html", data=small_images, reference=reference, names=names)


class Reader(HTMLParser):
    """Tags that are open, tags that were seen, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_everything(whole, folder):
    page = (folder / "r.html").read_text()
    read = Reader(page)
    assert not read.open
    assert len(page) < 1_000_000
    activations = [site for product in whole.products for site in product.sites if site.source != "weight"]
    assert all(site.seen is not None for product in whole.products for site in product.sites)
    assert read.seen.count("svg") == len(whole.plan.quantizers) + 3
    for site in activations:
        assert site.site in read.text
    words = " ".join(read.text.split())
    for part in (
        str(whole.known.against.headline()),
        str(whole.known.latency),
        "W8A8, 14 products, 28 sites",
        "Signal to noise of each product over 2 blocks, blocks.0 to blocks.1.",
        "MatMulIntegerToFloat",
        "prepared = ptq.prepare_fx(model, ptq.recipes.best(8, 8, weights='channel', twins='exact'), images[:1])",
    ):
        assert part in words, part
    assert not missing_of(whole)


def test_the_page_fetches_nothing(folder, whole):
    page = (folder / "r.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    fetching = [(name, value) for name, value in Reader(page).attributes if name in ("src", "href", "action", "data")]
    assert not fetching
    assert all(value.startswith("#") for name, value in Reader(page).attributes if name == "xlink:href")
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_what_is_seen_is_what_the_search_saw(whole, small_converted):
    """On the images of the calibration, in a file that computes what was simulated: nearly the ratios of the search."""
    pairs = [(s.snr, s.seen.snr) for p in whole.products for s in p.sites if s.seen.snr is not None]
    assert len(pairs) > 14
    assert np.median([abs(mine - theirs) for mine, theirs in pairs]) < 1.0
    for product in whole.products:
        assert product.after == pytest.approx(small_converted.calibration.distances[product.name][1], rel=1e-4)
        assert product.runs == "integers"
    assert sum(product.cost for product in whole.products) == pytest.approx(1)
    costs = [product.cost for product in whole.costly()]
    assert costs == sorted(costs, reverse=True)
    softmax = next(s for p in whole.products for s in p.sites if s.source == "softmax")
    (first, *_), total = softmax.seen.views, 8 * 2 * 17 * 17
    assert first.counts.sum() == total
    assert (softmax.seen.levels.min(), softmax.seen.threshold) == (0.0, pytest.approx(softmax.threshold))


def test_clipped_values_are_clipped(tmp_path, small_vit, small_images):
    """At 4 bits, where a clamp stands in front of quantizers: what it cuts off is counted in front of it."""
    mapping = ptq.recipes.ptq4vit(4, 4, twins="wide").with_search(n=4, rounds=1)
    ptq.export_onnx(
        ptq.quantize(small_vit, small_images, qconfig_mapping=mapping, progress=False),
        tmp_path / "m.onnx",
        small_images[:1],
    )
    found = ptq.report(tmp_path / "m.onnx", data=small_images[:4], bench=False)
    seen = {s.site: s.seen for p in found.products for s in p.sites if s.seen is not None and s.source != "weight"}
    assert bits_of(found.plan) == "W4A4-8"
    assert max(one.clipped for one in seen.values()) > 0
    assert all(one.used <= one.codes for one in seen.values())
    assert {one.codes for site, one in seen.items() if "qkv" in site} == {16}
    assert found.images_seen == 4


def test_levels_are_what_a_quantizer_gives():
    unsigned = Uniform(3, signed=False, minimum=0.17)
    params = UniformParams(torch.tensor(0.1))
    assert levels(unsigned, params).tolist() == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.4, 0.5])
    for wide in (False, True):
        twin = TwinUniform(4, wide=wide)
        own = twin.softmax_params(torch.tensor(3))
        reached = torch.unique(twin.fake_quantize(torch.linspace(0, 1, 100_001), own))
        assert torch.equal(levels(twin, own), reached)


def test_a_file_alone_and_a_calibration_say_what_they_lack(folder, small_images):
    alone = ptq.report(folder / "model.onnx", bench=False)
    assert list(missing_of(alone)) == ["against", "histograms", "times"]
    assert "--data FOLDER" in missing_of(alone)["histograms"]
    assert all((site.seen is None) is (site.source != "weight") for p in alone.products for site in p.sites)
    scales = ptq.report(folder / "scales.safetensors", folder / "s.html")
    assert [p.after for p in scales.products] == pytest.approx([p.after for p in alone.products], rel=1e-4)
    assert "of a calibration" in (folder / "s.html").read_text()
    assert set(missing_of(scales)) == {"against", "histograms", "times"}
    assert "report its ONNX file" in missing_of(scales)["times"]
    assert scales.to_dict()["against"] is None
    json.dumps(alone.to_dict())


def test_a_file_of_before_takes_its_figures_from_its_calibration(folder, tmp_path, small_converted):
    model = onnx.load(folder / "model.onnx")
    kept = [entry for entry in model.metadata_props if entry.key != FIGURES_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "old.onnx")
    old = ptq.report(tmp_path / "old.onnx", bench=False)
    assert "quantize again, or add --calibration" in missing_of(old)["costs"]
    assert [product.order for product in old.costly()] == list(range(14))
    assert "No figures of the search are known" in old.page()
    new = ptq.report(tmp_path / "old.onnx", calibration=folder / "scales.safetensors", bench=False)
    assert "costs" not in missing_of(new)
    params = dict(small_converted.calibration.params)
    params["head:lhs"] = UniformParams(params["head:lhs"].scale * 2)
    other = replace(small_converted.calibration, params=params)
    with pytest.raises(ptq.PTQError, match=r"expected the calibration of .*, fingerprint \w+, got \w+; pass the one"):
        ptq.report(tmp_path / "old.onnx", calibration=other)


def test_names_are_text_in_the_page(folder, whole):
    evil = "<script>alert(1)</script>\x1b\u202e\"'&"
    first, *others = whole.products
    sites = tuple(replace(site, site=f"{evil}{site.operand}") for site in first.sites)
    worst = replace(whole.known.against.worst, name=evil)
    known = replace(whole.known, warnings=(evil,), command=evil, against=replace(whole.known.against, worst=worst))
    changed = replace(
        whole,
        name=evil,
        products=(replace(first, name=evil, sites=sites), *others),
        known=known,
        provenance=dict(whole.provenance) | {"loss": evil, "list": [evil]},
        plan=replace(whole.plan, float_ops=(FloatOp(evil, evil),)),
    )
    page = changed.page()
    assert page.count("<script>") == 1
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "alert(1)" in Reader(page).text
    assert (
        len(Reader(page).seen) == len(Reader(whole.page()).seen) + 4 + 7
    )  # a list of warnings, and a table of one row


def test_what_the_page_is_about_stays(folder, tmp_path):
    for path in ("model.onnx", "./model.onnx"):
        with pytest.raises(ptq.PTQError, match="expected another file than those it is about"):
            ptq.report(folder / "model.onnx", folder / path)
    with pytest.raises(ptq.PTQError, match="an existing, writable folder"):
        ptq.report(folder / "model.onnx", tmp_path / "none" / "r.html")
    with pytest.raises(ptq.PTQError, match="expected an ONNX file that it goes with, got a calibration"):
        ptq.report(folder / "scales.safetensors", data=torch.zeros(1, 3, 16, 16))
    with pytest.raises(ptq.PTQError, match="expected a file with a quantization plan"):
        ptq.report(folder / "float.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_of_scales_that_nobody_has(folder, tmp_path, small_images):
    model = onnx.load(folder / "model.onnx")
    for value in (0.0, float("nan")):
        scale = next(one for one in model.graph.initializer if one.name == "blocks.0.mlp.fc1:lhs.scale")
        scale.CopyFrom(onnx.numpy_helper.from_array(np.float32(value), scale.name))
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(ptq.PTQError, match=r"changed.onnx: blocks.0.mlp.fc1:lhs.scale: expected normal positive"):
            ptq.report(tmp_path / "changed.onnx", data=small_images, bench=False)


def test_infinite_and_missing_figures_are_told_apart(whole):
    first, *others = whole.products
    lhs, rhs = first.sites
    changed = replace(
        first, sites=(replace(lhs, snr=None, exact=True), replace(rhs, snr=math.nan)), cost=None, snr=None
    )
    page = replace(whole, products=(changed, *others)).page()
    assert ">exact</span>" in page
    assert ">–</span>" in page
    assert "nan" not in Reader(page).text


def test_blocks_and_roles():
    assert block_and_role("blocks.3.attn.qkv") == ("blocks.3", "attn.qkv")
    assert block_and_role("layers.2.blocks.1.mlp.fc1") == ("layers.2.blocks.1", "mlp.fc1")
    assert block_and_role("head") == ("", "head")
    assert block_and_role("features.0") == ("", "features.0")


def test_commands_that_repeat(whole):
    told = replace(
        whole, provenance={"model": "deit_tiny", "recipe": "best", "images": 16, "seed": 3, "loss": "fisher"}
    )
    (line,) = repeat_of(told)
    assert line.startswith("ptq4vit quantize deit_tiny --data FOLDER --out ")
    assert line.endswith("--recipe best --w-bits 8 --a-bits 8 --images 16 --seed 3 --loss fisher --target onnxruntime")
    assert repeat_of(replace(told, known=replace(told.known, command="ptq4vit x"))) == ("ptq4vit x",)
