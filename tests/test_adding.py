"""docs/extending.md says how to add five kinds of things: this does just that, to a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PAGE = ROOT / "docs" / "extending.md"
#: A block of Python with a title: the file, alone where it is a new one, else with the line that the block goes to.
BLOCK = re.compile(
    r'^```python title="([^",\n]+)(?:, (above|in place of) ([^\n]+))?"\n(.*?)^```$', re.DOTALL | re.MULTILINE
)

PROGRAM = """
import sys, torch, torch.nn.functional as F, onnxruntime
from torch import nn
import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.contract import history
from ptq4vit_fx.quantizers.power_of_two import PowerOfTwo
from ptq4vit_fx.tools.families import find_family

class Model(nn.Module):
    def __init__(self, activation, unpack):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 4)
        self.activation, self.unpack = activation, unpack
    def forward(self, x):
        x = self.b(self.activation(self.a(self.norm(x)))).mean((1, 2))
        return torch.stack([*x.unbind(1)], 1) if self.unpack else x  # torch.fx cannot unpack, torch.export can

images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
for unpack in (False, True):
    for activation in (F.selu, nn.SELU(), nn.SELU(inplace=True), torch.selu_):
        prepared = ptq.prepare_fx(Model(activation, unpack).eval(), ptq.recipes.ptq4vit(), images[:1])
        assert [r.count for r in history(prepared) if r.name == "count_norms"] == [1], history(prepared)
        assert history(prepared)[0].name == ("trace_by_export" if unpack else "trace")
        assert prepared.plan.op("b").lhs_source == "selu", (unpack, activation, prepared.plan)
        assert prepared.plan.quantizers["b:lhs"] == ptq.TwinUniform(8, "gelu", minimum=1.7580993408473766)
ptq.calibrate(prepared, images, progress=False)
converted = ptq.convert_fx(prepared)
ptq.export_onnx(converted, sys.argv[1], images[:1], target="everything")
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
error = (torch.from_numpy(logits) - converted(images)).norm() / converted(images).norm()
assert error < 1e-3, error

power = ptq.QConfigMapping().set_global(ptq.QConfig(PowerOfTwo(8), PowerOfTwo(8, granularity="channel"), PowerOfTwo(8)))
prepared = ptq.prepare_fx(Model(F.selu, False).eval(), power, images[:1])
ptq.calibrate(prepared, images, progress=False).save(sys.argv[2])
calibration = ptq.Calibration.load(sys.argv[2])
for key, params in calibration.params.items():
    assert isinstance(calibration.plan.quantizers[key], PowerOfTwo), key
    assert (torch.frexp(params.scale).mantissa == 0.5).all(), (key, params)
report = ptq.export_onnx(ptq.convert_fx(prepared), sys.argv[1], images[:1])
assert ptq.verify_onnx(sys.argv[1], ptq.convert_fx(prepared), images).ok

network = find_family("vit_narrow").create()
assert len(ptq.prepare_fx(network, ptq.recipes.ptq4vit(), torch.randn(1, 3, 32, 32)).plan.ops) == 8
print("added")
"""


def put(root: Path, file: str, how: str | None, place: str, source: str) -> None:
    """Write a new file, or put lines above or in place of the one line that has the text `place`."""
    path = root / file
    if how is None:
        assert not path.exists(), file
        path.write_text(source, encoding="utf-8")
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (number,) = (number for number, line in enumerate(lines) if place in line)
    lines[number : number + (how == "in place of")] = [source]
    path.write_text("".join(lines), encoding="utf-8")


def test_what_the_page_adds_is_there_and_works(tmp_path):
    for folder in ("ptq4vit_fx", "passes", "export"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == PAGE.read_text(encoding="utf-8").count("```python")
    for file, how, place, source in blocks:
        put(tmp_path, file, how or None, place, source)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PROGRAM,
        str(tmp_path / "model.onnx"),
        str(tmp_path / "s.safetensors"),
    ]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.strip().endswith("added"), result.stderr
