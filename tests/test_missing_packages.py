"""An export that fails because of a package names the package, not the model or its batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

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
