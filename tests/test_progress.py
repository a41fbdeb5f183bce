"""What one sees while waiting: how far a phase is, how long it will take, and nothing where nobody wants to see it."""

from __future__ import annotations

import io
import re
import time

import pytest
import torch
from rich.console import Console

import ptq4vit_fx as ptq
from ptq4vit_fx.inputs import progress
from ptq4vit_fx.inputs.progress import Display, UnderWay, clock, counted
from ptq4vit_fx.passes.graph.contract import plan_of
from ptq4vit_fx.tools.phases import EXPORT, FLOAT, TRACE, TRACES, Phases, calls


def plain(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, soft_wrap=True, force_terminal=False)


def text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize(
    ("moment", "seconds", "first", "line"),
    [
        (UnderWay("read images", 8, 32), 10.0, 0, "read images: 8 of 32 images, 0:10, about 0:30 to go"),
        (
            UnderWay("search", 20, 74, "products", "head"),
            10.0,
            10,
            "search: 20 of 74 products, 0:10, about 0:54 to go (head)",
        ),
        (UnderWay("search", 10, 74, "products"), 10.0, 10, "search: 10 of 74 products, 0:10"),
        (UnderWay("export", expected=100.0), 40.0, 0, "export, 0:40, about 1:00 to go"),
        (UnderWay("export", expected=100.0), 140.0, 0, "export, 2:20"),
        (UnderWay("a\x1b[2J\nb"), 4000.0, 0, r"a\x1b[2J\nb, 1:06:40"),
    ],
)
def test_a_line_says_how_far_and_how_long(moment, seconds, first, line):
    assert moment.line(seconds, first).startswith(line)
    assert ("to go" in moment.line(seconds, first)) == ("about" in line)


def test_clocks():
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3599, 3600, 36001)] == [
        *("0:00", "1:00", "1:01", "59:59", "1:00:00", "10:00:01")
    ]


def test_batches_are_counted_by_their_images():
    seen = list[UnderWay]()
    batches = [(torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(1, 2), torch.zeros(1))]
    assert list(counted(batches, seen.append, "capture", 4)) == batches
    assert [(moment.done, moment.total) for moment in seen] == [(0, 4), (3, 4), (4, 4)]


def test_calls_are_counted():
    seen = list[UnderWay]()
    double = calls(lambda x: 2 * x, seen.append, "read images", 3)
    assert [double(x) for x in (1, 2)] == [2, 4]
    assert [(moment.phase, moment.done) for moment in seen] == [("read images", 1), ("read images", 2)]


def test_without_a_terminal_there_is_a_line_now_and_then():
    console = plain()
    with Display(console, every=0.05) as show:
        show(UnderWay("search", 1, 4, "products"))
        time.sleep(0.12)
        show(UnderWay("search", 2, 4, "products"))
        time.sleep(0.12)
    lines = text_of(console).splitlines()
    assert lines[0].startswith("search: 1 of 4 products, 0:00")
    assert lines[-1].startswith("search: 2 of 4 products, 0:00, about 0:00 to go")
    time.sleep(0.12)
    assert text_of(console).splitlines() == lines  # it ends with its context


def test_what_is_short_says_nothing_without_a_terminal(monkeypatch):
    assert progress.EVERY == 30
    console = plain()
    with Phases(console)("read images"):
        time.sleep(0.01)
    assert text_of(console) == ""


def test_in_a_terminal_it_is_drawn_and_taken_away():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    phases = Phases(console)
    with phases(TRACE), pytest.raises(RuntimeError), phases("read images"):
        raise RuntimeError
    with phases("read images"):
        phases.show(UnderWay("read images", 8, 32))
        time.sleep(0.7)
    drawn = text_of(console)
    assert "read images: 8 of 32 images" in drawn
    assert drawn.endswith("\x1b[2K") or "\x1b[2K" in drawn.rpartition("images")[2]
    with phases("read the model", drawn=False):  # the hub draws its own bar
        time.sleep(0.2)
    assert "read the model" not in text_of(console)


def test_one_phase_tells_how_long_the_next_takes():
    phases, seen = Phases(plain(), shown=False), list[UnderWay]()
    phases.show = seen.append
    with phases(TRACE, 0.5):
        time.sleep(0.05)
    with phases(EXPORT):
        pass
    assert [moment.expected for moment in seen] == [0.5, pytest.approx(TRACES[EXPORT] * phases.seconds[TRACE])]
    assert phases.seconds[TRACE] >= 0.05
    with phases("calibrate"), phases("read images"):
        pass
    assert list(phases.seconds) == [TRACE, EXPORT, "read images", "calibrate"]
    assert FLOAT in TRACES


def test_nothing_is_shown_where_nobody_wants_it():
    console = Console(file=io.StringIO(), force_terminal=True)
    with Phases(console, shown=False, every=0.01)(TRACE):
        time.sleep(0.05)
    assert text_of(console) == ""


def test_calibrate_and_verify_tell_how_far_they_are(tmp_path, small_vit, small_images):
    seen = list[UnderWay]()
    prepared = ptq.prepare_fx(small_vit, ptq.recipes.best().with_search(n=2, rounds=1), small_images[:1])
    ptq.calibrate(prepared, small_images, progress=seen.append)
    products, count = len(plan_of(prepared).ops), len(small_images)
    phases = list(dict.fromkeys(moment.phase for moment in seen))
    assert phases == ["measure ranges of channels", "capture operands and gradients", "search and round"]
    last = {moment.phase: moment for moment in seen}
    assert [(last[phase].done, last[phase].total) for phase in phases] == [(count, count)] * 2 + [(products, products)]
    assert last["search and round"].detail in {op.name for op in plan_of(prepared).ops}
    seen.clear()
    converted = ptq.convert_fx(prepared)
    ptq.export_onnx(converted, tmp_path / "m.onnx", small_images[:1])
    ptq.verify_onnx(tmp_path / "m.onnx", converted, small_images, progress=seen.append)
    ptq.compare_float(tmp_path / "m.onnx", small_vit, small_images, progress=seen.append)
    phases = list(dict.fromkeys(moment.phase for moment in seen))
    assert [re.sub(":.*", "", phase) for phase in phases] == ["verify"] * 4 + ["compare with float"] * 2
    assert all(moment.done <= moment.total == count for moment in seen if moment.total)
