"""The table of runtimes: printed, in docs/targets.md, and each of its flags is one of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ptq4vit_fx.export.targets import TARGETS
from ptq4vit_fx.tools.cli import app
from ptq4vit_fx.tools.runtimes import RUNTIMES, as_markdown, as_text

ROOT = Path(__file__).resolve().parents[1]


def test_the_document_has_the_table():
    assert as_markdown() in (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")


def test_it_is_printed_in_lines_of_a_terminal():
    done = CliRunner().invoke(app, ["targets"])
    assert done.exit_code == 0, done.output
    for runtime in RUNTIMES:
        assert f"\n{runtime.name}\n" in done.output
    assert max(map(len, as_text(80).splitlines())) <= 80


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_its_flags_are_flags_of_quantize(runtime):
    quantize = getattr(typer.main.get_command(app), "commands", {})["quantize"]
    options = {option for parameter in quantize.params for option in parameter.opts}
    named = re.findall(r"--[a-z-]+", f"{runtime.flags} {runtime.note}")
    assert set(named) <= options
    for target in re.findall(r"--target (\S+)", runtime.flags):
        assert target in TARGETS


def test_every_target_has_its_row():
    named = {target for runtime in RUNTIMES for target in re.findall(r"--target (\S+)", runtime.flags)}
    assert named | {"onnxruntime"} == set(TARGETS)
