"""What the documentation shows is run: its Python, its command lines, and the short programs in examples/."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import typer
from scripts import load_script

import ptq4vit_fx
from ptq4vit_fx.tools.cli import app

ROOT = Path(__file__).resolve().parents[1]
FIRST = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
DOCUMENTS = [*(ROOT / name for name in FIRST), *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = ROOT / "examples"
#: What would be downloaded or take minutes, and what is run in its place; everything else runs as it is written.
STAND_INS = {
    '"vit_small_patch16_224", pretrained=True': (
        '"vit_small_patch16_224", img_size=32, embed_dim=64, depth=1, num_heads=2'
    ),
    "torch.randn(32, 3, 224, 224)": "torch.randn(4, 3, 32, 32)",
    '"tiny_vit_5m_224", pretrained=False, num_classes=10': (
        '"tiny_vit_5m_224", num_classes=10, embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), window_sizes=(4, 4)'
    ),
    "torch.randn(4, 3, 224, 224)": "torch.randn(4, 3, 64, 64)",
}
#: Names of programs in the tables of README.
SHORT = {"SIM": "python examples/simulate.py --fixtures FOLDER", "ACC": "python examples/accuracy.py --fixtures FOLDER"}


def run_source(source: str, name: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run Python with its stand-ins; return its names, with those that it found."""
    for written, small in STAND_INS.items():
        source = source.replace(written, small)
    assert not re.search(r", pretrained=True|\b224, 224", source), f"{name}: add a stand-in for what is large"
    names: dict[str, Any] = {"__name__": "__main__", **(before or {})}
    exec(compile(source, name, "exec", dont_inherit=True), names)
    return names


def python_blocks() -> Iterator[tuple[str, str]]:
    """Yield (document and line, source) of each block of Python."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            yield f"{path.name}:{text.count(chr(10), 0, block.start()) + 1}", block[1]


@pytest.mark.filterwarnings("ignore::ptq4vit_fx.errors.PTQWarning")
def test_python_in_the_documents_runs(tmp_path, monkeypatch, capsys):
    """In the order of the documents, in one folder: README writes the file that deploy.md and targets.md read.

    The blocks of a document go on from each other, as a reader does; python.md goes on from README. Blocks with a title
    are those that test_adding.py puts into a copy of the project.
    """
    monkeypatch.chdir(tmp_path)
    names: dict[str, dict[str, Any]] = {}
    for place, source in python_blocks():
        document = place.partition(":")[0]
        before = names["README.md"] if document == "python.md" else names.get(document)
        names[document] = run_source(source, place, before)
    pages = ["configuration.md", "deploy.md", "python.md", "quickstarts.md", "targets.md", "transforms.md"]
    assert list(names) == ["README.md", *pages]
    quantized, configured, deployed, _, started, read, transformed = names.values()
    assert deployed["scores"].shape == (1, 1000)
    assert started["report"].outputs == ("classes", "features")
    assert [change.leaves_float for change in configured["mapping"].changes] == [False, False, True]
    printed = capsys.readouterr().out
    assert "to the last bit" in printed
    assert "fold_head_scales" in printed
    assert all(record.done for record in transformed["prepared"].plan.transformed), transformed["prepared"].plan.table()
    written = {"model.onnx", "own.onnx", "embedding.onnx", "segmenter.onnx"}
    assert {path.name for path in tmp_path.iterdir()} == written
    params = quantized["converted"].calibration.params
    assert read["scales"]["blocks.0.attn.proj:rhs.scale"].shape == params["blocks.0.attn.proj:rhs"].scale.shape
    assert "blocks.0.attn.matmul_qk:lhs" in read["calibrated"]


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """Offline: files, and headings in them. What leads into the web is looked at by people."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (document.parent / path) if path else document
        assert target.exists(), f"{document.name}: {link}"
        assert target.resolve().is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{document.name}: {link}"


def test_the_front_page_is_short_and_every_page_is_in_the_site():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r": ([\w.]+\.md)$", site, re.MULTILINE))


def test_one_version():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == ptq4vit_fx.__version__
    assert f"ptq4vit_fx-{ptq4vit_fx.__version__}-" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["quantize_timm", "quantize_torchvision", "quantize_huggingface"])
@pytest.mark.filterwarnings("ignore::ptq4vit_fx.errors.PTQWarning")
def test_examples_run(tmp_path, monkeypatch, capsys, name):
    if name == "quantize_huggingface":
        pytest.importorskip("transformers", reason="the extra hf is not installed")
    monkeypatch.chdir(tmp_path)
    run_source((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"), f"{name}.py")
    (path,) = tmp_path.glob("*.onnx")
    onnx.checker.check_model(onnx.load(path), full_check=True)
    printed = capsys.readouterr().out
    assert str(path.name) in printed
    assert "ONNX Runtime against the simulation, 4 images" in printed


def commands_of(program: typer.Typer) -> dict[str, Any]:
    """Return name -> command; empty where the program is one command."""
    return dict(getattr(typer.main.get_command(program), "commands", {}))


def command_lines() -> Iterator[tuple[str, str]]:
    """Yield (document, command line) of whatever starts a program of this project: blocks, and `code` within a line."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines()] + re.findall(r"`([^`\n]+)`", text)
        for written in dict.fromkeys(lines):
            word, _, rest = written.partition(" ")
            line = f"{SHORT[word]} {rest}" if word in SHORT and rest else written
            if re.match(r"ptq4vit [a-z]|python examples/|make [a-z-]+$", line) and "..." not in line:
                yield path.name, line.translate(str.maketrans("", "", "[]"))


COMMAND_LINES = list(command_lines())


def test_command_lines_are_found():
    """Of each kind, so that a changed layout does not leave the next test without work."""
    starts = [line.split()[:2] for _, line in COMMAND_LINES]
    assert {name for program, name in starts if program == "ptq4vit"} == set(commands_of(app))
    assert sum(program == "python" for program, _ in starts) > 20
    assert sum(program == "make" for program, _ in starts) >= 3


@pytest.mark.parametrize(("document", "line"), COMMAND_LINES, ids=[f"{d} {line[:60]}" for d, line in COMMAND_LINES])
def test_command_lines_are_understood(monkeypatch, tmp_path, document, line):
    (example,) = re.findall(
        r"^```toml\n(.*?)^```$", (ROOT / "docs/configuration.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "quantize.toml").write_text(example)
    monkeypatch.chdir(tmp_path)
    program, name, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "ptq4vit":
        command = commands_of(app)[name]
        if arguments or not any(parameter.required for parameter in command.params):  # else it is only mentioned
            command.make_context(name, arguments)
    else:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        parse_program(load_script(ROOT / name), arguments)


def parse_program(module: Any, arguments: list[str]) -> None:
    """Parse the arguments of a program in examples/ without running it."""
    if hasattr(module, "app"):
        command: Any = typer.main.get_command(module.app)
        if commands_of(module.app):
            name, *arguments = arguments
            command = commands_of(module.app)[name]
        if arguments[2:] != []:  # `SIM` and `ACC` themselves are introduced without a model
            command.make_context("program", arguments)
    elif arguments[2:] != []:
        module.parse_arguments()
