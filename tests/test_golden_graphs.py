"""A vision transformer of two blocks after each stage, as text: what every pass does, for whoever reviews one.

After a change that is meant: `UPDATE_GOLDEN=1 python -m pytest tests/test_golden_graphs.py`, and read the difference.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from graphs import calibrated, text_of, two_blocks
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.passes.graph.contract import stage_of
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.passes.write_qdq import write_qdq
from ptq4vit_fx.pipeline import CONVERSION, preparation

GOLDEN = Path(__file__).parent / "golden"
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graphs() -> dict[Stage, GraphModule]:
    """The graph at the end of each stage."""
    model = two_blocks()
    prepared = calibrated(model, X)
    canonical = trace(model, (X[:1],))
    preparation(ptq.recipes.ptq4vit()).until("annotate").run(canonical)
    converted = ptq.convert_fx(prepared)
    return {
        Stage.TRACED: trace(model, (X[:1],)),
        Stage.CANONICAL: canonical,
        Stage.OBSERVED: prepared,
        Stage.SIMULATED: CONVERSION.until("fold_weights").run(copy.deepcopy(prepared)),
        Stage.LOWERED: CONVERSION.until("lower_linears").run(copy.deepcopy(prepared)),
        Stage.CONVERTED: converted,
        Stage.QDQ: write_qdq(copy.deepcopy(converted)),
    }


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.value)
def test_the_graph_after_each_stage(graphs, stage):
    assert stage_of(graphs[stage]) is stage
    path, text = GOLDEN / f"{stage.value}.txt", text_of(graphs[stage])
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
