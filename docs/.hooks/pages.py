"""Pages of the site that are no files of docs/: documents of the root, and the options of the commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
#: Documents of the root that are pages of the site; README is not: index.md is its page.
DOCUMENTS = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def options_of_commands() -> str:
    """Return every command with its options as Markdown, as typer writes it."""
    from typer.cli import app as typer_app

    arguments = [str(ROOT / "ptq4vit_fx/tools/cli.py"), "utils", "docs", "--name", "ptq4vit", "--title", "Commands"]
    found = CliRunner().invoke(typer_app, arguments)
    if found.exit_code:
        raise RuntimeError(f"typer utils docs: {found.output}") from found.exception
    return found.stdout


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=re.sub(r"\]\(docs/", "](", text)))
    files.append(File.generated(config, "cli.md", content=options_of_commands()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links to documents of the root lead to their pages."""
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, DOCUMENTS))})", r"](\1", markdown)
