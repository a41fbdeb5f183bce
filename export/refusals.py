"""Why a graph has no ONNX form: what was tried, in which module and line, and what helps in that case."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ptq4vit_fx.errors import PTQError, failure
from ptq4vit_fx.passes.graph.batch_limits import BatchLimits
from ptq4vit_fx.passes.graph.causes import PIECES, Cause, cause_of, said
from ptq4vit_fx.passes.graph.dataflow import TAKEN_APART, call_name
from ptq4vit_fx.passes.graph.places import line_of, place_of_node
from ptq4vit_fx.passes.open_embeddings import embedding_call

OPERATOR = Cause(
    r"No ONNX function found|No decompositions registered",
    "operators that ONNX has",
    "write it out with torch's own functions before prepare_fx (attention as F.scaled_dot_product_attention)",
)
BATCH = Cause(
    r"Constraints violated|specialized it to be a constant|invalid for input of size|[sS]ize.*must match|\bs\d+\b"
    r"|Not all values of batch|tuple index out of range",
    "a forward for any number of images",
    "count images with x.shape[0] in that line",
)
DATA = Cause(
    r"[dD]ata-dependent|DataDependent|unbacked|Could not extract specialized|Boolean index_put",
    "sizes that do not depend on the values of pixels",
    "write selections by value (boolean masks, nonzero, unique) as torch.where or a multiplication, which keep sizes",
)
MEMORY = Cause(
    r"out of memory|MemoryError", "memory for a second copy of the model", "free memory, or export elsewhere"
)
OTHER = Cause(
    "",
    "a graph that torch.onnx.export translates",
    "mend that line if it is the model's, else report this together with the model",
)
#: In their order: the first whose pattern is in the text of the exception or of one behind it.
EXPORTING = (OPERATOR, DATA, MEMORY, BATCH)

_OPERATOR_NAME = re.compile(r"op='([\w.]+)', overload")
#: What torch says of a size that its own checks fix, instead of the line.
_LIMITED = re.compile(r"Not all values of batch|specialized it to be a constant")
_NODE = re.compile(r"(?:translating node|executing) %(\w+)")


def refused(
    error: BaseException, graphs: list[Graph], batch: int | None, only: int | None, limits: BatchLimits[Node | None]
) -> PTQError:
    """Return the error of an export that failed.

    graphs: where a node that the exporter names is looked for. only: the one batch size that the model takes, if known.
    limits: the nodes at which the batch could not be any number.
    """
    chain = list(_chain(error))
    missing = next((e for e in chain if isinstance(e, ImportError)), None)
    if missing is not None:
        return _without_package(missing)
    text = "\n".join(f"{type(e).__name__}: {e}" for e in chain)
    cause = cause_of(text, EXPORTING, OTHER)
    telling = next((e for e in reversed(chain) if str(e).strip()), error)
    node = _node(text, graphs) or (limits.first if cause is BATCH else None)
    got, do = said(telling), cause.do
    if node is not None and node is limits.first and _LIMITED.search(text):
        got = f"{'a constant' if limits.constants else 'a condition on it'} in that line"
    if cause is OPERATOR and (found := _OPERATOR_NAME.search(text)):
        got = found[1].replace(".", "::", 1)
    if cause is BATCH:
        fixed = f"pass batch={only or ''}, the number of images that the forward is written for"
        do = f"{fixed}, which is not {batch}" if batch else f"{_for_any_batch(node, got)}, or {fixed}"
    place = place_of_node(node) if node else "the model"
    return failure("export_onnx", place, expected=cause.expected, got=got, do=do)


def _for_any_batch(node: Node | None, got: str) -> str:
    """Return what helps a forward that torch.export does not take any batch through."""
    source = node.args[0] if node and node.target is operator.getitem else node
    is_piece = isinstance(source, Node) and call_name(source) in TAKEN_APART
    if node and (is_piece or re.search(PIECES.pattern, line_of(node))):
        return PIECES.do
    return "leave what depends on that condition out of that line" if "a condition" in got else BATCH.do


def check_bags(graph: Graph) -> None:
    """Raise PTQError on bags of embeddings that stayed closed, which the exporter would write as a loop."""
    for node in graph.nodes:
        if "mode" in (embedding_call(node) or {}):
            raise failure(
                "export_onnx",
                place_of_node(node),
                expected="bags of one length",
                got="embedding_bag with offsets, which ONNX does not have",
                do="pass it ids of shape (batch, length) without offsets, short bags filled up with padding_idx=",
            )


def _without_package(error: ImportError) -> PTQError:
    """Return the error of a package that torch's exporter imports, missing or too old for it, whatever the model is."""
    package = (error.name or "onnxscript").split(".")[0]
    return failure(
        "export_onnx",
        f"package {package}",
        expected=f"a version that the exporter of torch {torch.__version__} knows",
        got=said(error),
        do=f"run: pip install --upgrade {package}",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those behind it, the first cause last."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _node(text: str, graphs: list[Graph]) -> Node | None:
    """Return the node that the exporter names, of which the module and line are known if they are of any."""
    names = _NODE.findall(text)
    every = [node for graph in graphs for node in graph.nodes]
    nodes = [node for name in names for node in every if node.name == name]
    if not nodes:  # a decomposition has names of its own, most of which end like the operator
        nodes = [node for name in names for node in every if name in node.name and node.op.startswith("call")]
    return min(nodes, key=lambda node: not line_of(node), default=None)
