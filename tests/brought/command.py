"""The command line as a case uses it: what it printed, or the error of ours that it ended with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from brought.pipeline import vit
from ptq4vit_fx.tools.cli import app

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
#: The ViT of `brought.pipeline.vit` as `ptq4vit quantize` takes it.
VIT = ["vit_tiny_patch16_224", *(part for key, value in SIZE.items() for part in ("--model-arg", f"{key}={value}"))]


def command(*arguments: object) -> str:
    """Run `ptq4vit` and return what it printed; raises PTQError with the sentence that it ended with."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code:
        assert result.exit_code == 1, result.output
        assert "\x1b" not in result.output
        lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, result.output
        raise ptq.PTQError(lines[0])
    return result.output


def vit_checkpoint(path: Path, **arguments: Any) -> None:
    """Save the weights of the ViT."""
    torch.save(vit(**arguments).state_dict(), path)
