"""What fails because of a package names the package, not the model or its batch; an extra that is missing is named."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from ptq4vit_fx import PTQError
from ptq4vit_fx.tools.cli import app
from ptq4vit_fx.tools.digits import load_digits_images
from ptq4vit_fx.tuning.frontier import draw

#: Loads a converted model, hides a module from the import system, and exports.
PROGRAM = """
import sys, warnings
import torch
import ptq4vit_fx
from ptq4vit_fx.export.onnx_export import export_onnx

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(hidden):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

warnings.simplefilter("ignore")
model, hidden, out = sys.argv[1:]
for name in [name for name in sys.modules if name.startswith(hidden)]:
    del sys.modules[name]
sys.meta_path.insert(0, Hidden())
try:
    export_onnx(torch.load(model, weights_only=False), out, torch.zeros(1, 3, 16, 16))
except ptq4vit_fx.PTQError as error:
    print(hidden, error)
"""


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("onnxscript._framework_apis.torch_", "onnxscript"),  # what an onnxscript that is older than the exporter lacks
        ("onnxscript.function_libs.torch_lib.ops", "onnxscript"),
        ("onnx_ir.passes.common", "onnx_ir"),
    ],
)
def test_the_package_is_named(tmp_path, small_converted, module, package):
    torch.save(small_converted, tmp_path / "model.pt")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model.pt"), module, str(tmp_path / "model.onnx")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"export_onnx: package {package}: expected a version that the exporter of torch" in result.stdout, (
        result.stderr
    )
    assert f"pip install --upgrade {package}" in result.stdout
    assert "batch" not in result.stdout


@pytest.mark.parametrize(
    ("missing", "extra", "command"),
    [
        ("sklearn", "demo", "demo --out out"),
        ("matplotlib", "demo", "demo --out out"),
        ("matplotlib", "report", "report model.onnx -o page.html"),
        ("matplotlib", "report", "quantize vit_small_patch16_224 --data photos --out model.onnx --report page.html"),
    ],
)
def test_an_extra_is_named_before_the_work(monkeypatch, tmp_path, missing, extra, command):
    """Before --data is read, too: there is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1
    assert f"expected the package {missing}, got none; pip install 'ptq4vit-fx[{extra}]'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_pictures_and_digits_name_their_extra(monkeypatch, tmp_path):
    for name in ("sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PTQError, match=r"tune: the picture: .*ptq4vit-fx\[report\]"):
        draw([], "time", None, tmp_path / "frontier.png")
    with pytest.raises(PTQError, match=r"load_digits_images: .*ptq4vit-fx\[demo\]"):
        load_digits_images("test")
