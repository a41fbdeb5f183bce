"""What is imported only when it is used: `--help` answers without torch, a file is read without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ptq4vit_fx


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import ptq4vit_fx", ("torch", "timm", "onnx", "onnxruntime", "numpy")),
        ("import ptq4vit_fx.tools.cli", ("torch", "timm", "onnx", "onnxruntime")),
        ("import ptq4vit_fx.export.metadata", ("torch", "timm", "onnxruntime", "onnxscript")),
        ("import ptq4vit_fx; ptq4vit_fx.prepare_fx", ("onnxruntime", "onnxscript", "matplotlib", "sklearn")),
    ],
)
def test_what_an_import_does_without(statement, without):
    program = f"import sys; {statement}; print(*[name for name in {without!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_every_public_name_is_there():
    for name in ptq4vit_fx.__all__:
        assert getattr(ptq4vit_fx, name) is not None
    assert set(ptq4vit_fx.__all__) <= set(dir(ptq4vit_fx))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        ptq4vit_fx.quantise  # noqa: B018
