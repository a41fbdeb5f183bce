"""ARCHITECTURE.md says how to add an activation, a pass and a target: this does just that, to a copy of the project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ACTIVATION = '    Activation("selu", 1.7580993408473766, F.selu, nn.SELU, aten.selu.default, aten.selu_.default),\n'
PASS = '''"""Count the norms."""

from __future__ import annotations

import torch.nn.functional as F
from torch.fx import GraphModule

from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.stages import Stage


@graph_pass(before=Stage.CANONICAL, after=Stage.CANONICAL)
def count_norms(graph_module: GraphModule) -> int:
    """Rewrite nothing; return how many norms there are."""
    return sum(node.target is F.layer_norm for node in graph_module.graph.nodes)
'''
PASS_LINE = '        (count_norms, "behind canonicalize, which spells norms alike"),\n'
TARGET = '''"""A runtime that takes everything."""

from __future__ import annotations

from ptq4vit_fx.export.contract import Target
from ptq4vit_fx.export.targets.generic import check_generic

TARGET = Target("everything", (), check_generic)
'''

PROGRAM = """
import sys, torch, torch.nn.functional as F, onnxruntime
from torch import nn
import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.contract import history

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
print("added")
"""


def insert(path: Path, line: str, *, above: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(above) == 1
    path.write_text(text.replace(above, line + above), encoding="utf-8")


def test_an_activation_a_pass_and_a_target_are_what_the_architecture_says(tmp_path):
    for folder in ("ptq4vit_fx", "passes", "export"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    insert(tmp_path / "ptq4vit_fx/activations.py", ACTIVATION, above='    Activation("quick_gelu"')
    (tmp_path / "passes/count_norms.py").write_text(PASS, encoding="utf-8")
    pipeline = tmp_path / "ptq4vit_fx/pipeline.py"
    insert(
        pipeline, "from ptq4vit_fx.passes.count_norms import count_norms\n", above="from ptq4vit_fx.passes.decompose"
    )
    insert(pipeline, PASS_LINE, above="        (fold_constants,")
    (tmp_path / "export/targets/everything.py").write_text(TARGET, encoding="utf-8")
    targets = tmp_path / "export/targets/__init__.py"
    insert(
        targets,
        "from ptq4vit_fx.export.targets import everything\n",
        above="from ptq4vit_fx.export.targets import generic",
    )
    insert(targets, "        everything.TARGET,\n", above="        generic.TARGET,")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "model.onnx")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.strip().endswith("added"), result.stderr
