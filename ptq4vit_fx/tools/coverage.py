"""`ptq4vit coverage`: build, trace, quantize, export and verify one model of every family; write the table."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4vit_fx.activations import NEGATIVE_RANGE
from ptq4vit_fx.api import calibrate, convert_fx, prepare_traced
from ptq4vit_fx.export.onnx_export import export_onnx
from ptq4vit_fx.export.proof.verify import verify_onnx
from ptq4vit_fx.files import check_writable, make_folder, write_file
from ptq4vit_fx.names import is_inside
from ptq4vit_fx.passes.fold_constants import FOLDED_LAYERS
from ptq4vit_fx.passes.graph.activations import activation_of
from ptq4vit_fx.passes.graph.contract import history, plan_of
from ptq4vit_fx.passes.graph.marks import planned_product
from ptq4vit_fx.passes.graph.outputs import LOGITS, plain_outputs, tensor_outputs
from ptq4vit_fx.passes.graph.shapes import MULTIPLIES
from ptq4vit_fx.passes.trace import trace
from ptq4vit_fx.qconfig import QConfigMapping
from ptq4vit_fx.quantizers import TwinUniform
from ptq4vit_fx.recipes import ptq4vit
from ptq4vit_fx.tools.coverage_table import Row, markdown
from ptq4vit_fx.tools.families import Family
from ptq4vit_fx.torch_state import without_fast_attention

#: What the file must share with the simulation: the smallest cosine over the images. Not more, because float
#: convolutions differ in the last bit between CPUs, which random networks amplify (mobilevit: 0.9987 with AVX-512).
COSINE = 0.995
#: Random images that a model is calibrated and verified on.
IMAGES = 4

_aten = torch.ops.aten
#: Operators that multiply two activations, and how many products each is.
ATTENTION_OPERATORS = {
    _aten.bmm: 1,
    _aten.baddbmm: 1,
    _aten._scaled_dot_product_flash_attention_for_cpu: 2,
    _aten._scaled_dot_product_flash_attention: 2,
    _aten._scaled_dot_product_efficient_attention: 2,
}


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Expected:
    """What the float model does: its logits, the layers that ran, the number of products of activations."""

    logits: Tensor
    layers: frozenset[str]
    attention: int


def observe(model: nn.Module, images: Tensor) -> Expected:
    """Run the float model as it is and note what ran."""
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad(), without_fast_attention(), _Calls() as calls:
        output = model(images)
    for hook in hooks:
        hook.remove()
    return Expected(
        _outputs(output)[LOGITS],
        frozenset(ran),
        sum(calls.counts[operator] * products for operator, products in ATTENTION_OPERATORS.items()),
    )


def cover(family: Family, mapping: QConfigMapping | None = None) -> Row:
    """Take one family through everything (default: recipe ptq4vit); whatever goes wrong is the row's problem."""
    started = time.perf_counter()
    row: dict[str, Any] = {"family": family.name, "model": family.model}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            row |= _measure(family, mapping or ptq4vit())
        except Exception as error:  # noqa: BLE001 - the table says what it was
            row["problem"] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return Row(**row, seconds=round(time.perf_counter() - started, 1))


def _measure(family: Family, mapping: QConfigMapping) -> dict[str, Any]:
    model = family.create()
    images = torch.randn(IMAGES, 3, family.image, family.image, generator=torch.Generator().manual_seed(0))
    expected = observe(model, images)
    traced = trace(model, (images[:1],))
    equal = _is_traced(traced, model, images)
    prepared = prepare_traced(traced, mapping, (images[:1],))
    plan = plan_of(prepared)
    planned = {op.name for op in plan.ops}
    folded = set(prepared.meta[FOLDED_LAYERS])
    float_ops = {op.name: op.reason for op in plan.float_ops}
    row: dict[str, Any] = {
        "tracer": history(prepared)[0].name,
        "layers": len(expected.layers),
        "quantized_layers": len(expected.layers & planned),
        "folded_layers": len(expected.layers & folded),
        "attention": expected.attention,
        "quantized_attention": sum(op.kind == "matmul" for op in plan.ops),
        "twins": sum(isinstance(quantizer, TwinUniform) for quantizer in plan.quantizers.values()),
        "twin_functions": _twin_functions(prepared),
        "multiplies": _quantized_share(prepared),
        "float_ops": float_ops,
    }
    unseen = [name for name in expected.layers - planned - folded if not _is_listed(name, float_ops)]
    missing = expected.attention - row["quantized_attention"] - len(float_ops)
    problem = None if equal else "the traced graph is not bit-equal at batch 1 and 4"
    if unseen or missing > 0:
        problem = f"neither quantized nor listed: {', '.join(unseen)}, {max(0, missing)} products of activations"
    calibrate(prepared, images, progress=False)
    row |= _deploy(convert_fx(prepared), images, expected)
    if row["cosine"] < COSINE:
        problem = problem or f"ONNX Runtime and the simulation have cosine {row['cosine']:.4f}"
    return row | {"problem": problem}


def _is_traced(traced: GraphModule, model: nn.Module, images: Tensor) -> bool:
    """Compare bits with the model as the graph holds it: its parameters need no gradient.

    torch.matmul may sum in another order where an operand requires one, even under no_grad.
    """
    model.requires_grad_(False)
    with torch.no_grad(), without_fast_attention():
        pairs = [(_outputs(model(batch)), _outputs(traced(batch))) for batch in (images[:1], images)]
    return all(
        mine.keys() == graph.keys() and all(torch.equal(mine[name], graph[name]) for name in mine)
        for mine, graph in pairs
    )


def _outputs(output: Any) -> dict[str, Tensor]:
    return tensor_outputs(plain_outputs(output))


def _quantized_share(prepared: GraphModule) -> float:
    counts = [(n.meta.get(MULTIPLIES, 0), planned_product(n) is not None) for n in prepared.graph.nodes]
    return float(sum(n for n, quantized in counts if quantized) / max(1, sum(n for n, _ in counts)))


def _twin_functions(prepared: GraphModule) -> int:
    """Return how many softmaxes and functions with a bounded negative range the graph has."""
    found = [activation_of(node) for node in prepared.graph.nodes]
    return sum(name == "softmax" or (name is not None and NEGATIVE_RANGE[name] > 0) for name in found)


def _is_listed(name: str, float_ops: Iterable[str]) -> bool:
    return any(is_inside(name, listed) for listed in float_ops)


def _deploy(converted: GraphModule, images: Tensor, expected: Expected) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(converted, path, images[:1])
        report = verify_onnx(path, converted, images, layers=0)
    with torch.no_grad():
        similarity = torch.cosine_similarity(_outputs(converted(images))[LOGITS], expected.logits)
    return {"int8": float(similarity.min()), "cosine": report.simulation.cosine}


def run_coverage(families: Iterable[Family], out: Path, say: Callable[[str], None]) -> list[Row]:
    """Cover the families one after the other, and write coverage.md and coverage.json into the folder `out`."""
    make_folder(out, "coverage --out")  # before the minutes, not after
    check_writable(out / "coverage.md", "coverage --out")
    rows = []
    for family in families:
        rows.append(cover(family))
        say(f"{rows[-1].family}: {rows[-1].problem or 'works'}, {rows[-1].seconds:.1f} s")
    texts = {"coverage.md": markdown(rows), "coverage.json": json.dumps([asdict(row) for row in rows], indent=1)}
    for name, text in texts.items():
        write_file(out / name, f"{text}\n".encode(), "coverage --out")
    return rows
