"""The passes in their order, each with the reason of its place: values that can be printed, cut and timed.

print(CONVERSION)                                   # the steps and their reasons
CONVERSION.until("fold_weights").run(graph_module)  # stop behind one
print(timings(converted))                           # what each cost and rewrote
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch.fx import GraphModule

from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.inputs.settings import EXPONENTS
from ptq4vit_fx.passes.annotate import annotate
from ptq4vit_fx.passes.apply_balances import apply_balances
from ptq4vit_fx.passes.canonicalize import canonicalize
from ptq4vit_fx.passes.decompose_attention import decompose_attention
from ptq4vit_fx.passes.find_balances import find_balances
from ptq4vit_fx.passes.fold_batch_norms import fold_batch_norms
from ptq4vit_fx.passes.fold_constants import fold_constants
from ptq4vit_fx.passes.fold_head_scales import fold_head_scales
from ptq4vit_fx.passes.fold_weights import fold_weights
from ptq4vit_fx.passes.from_aten import from_aten
from ptq4vit_fx.passes.graph.contract import history
from ptq4vit_fx.passes.insert_observers import insert_observers
from ptq4vit_fx.passes.insert_quantizers import insert_quantizers
from ptq4vit_fx.passes.leave_float import leave_float
from ptq4vit_fx.passes.lower_activations import lower_activations
from ptq4vit_fx.passes.lower_linears import lower_linears
from ptq4vit_fx.passes.lower_patch_convolution import lower_patch_convolution
from ptq4vit_fx.passes.lower_products import lower_products
from ptq4vit_fx.passes.multiply_in_float32 import multiply_in_float32
from ptq4vit_fx.passes.narrow_tokens import narrow_tokens
from ptq4vit_fx.passes.open_einsum import open_einsum
from ptq4vit_fx.passes.open_embeddings import open_embeddings
from ptq4vit_fx.passes.open_vector_products import open_vector_products
from ptq4vit_fx.passes.remove_identities import remove_identities
from ptq4vit_fx.passes.replace_in_place import replace_in_place
from ptq4vit_fx.passes.rotate_residual import rotate_residual
from ptq4vit_fx.passes.round_weights import round_weights
from ptq4vit_fx.passes.slice_pieces import slice_pieces
from ptq4vit_fx.qconfig import QConfigMapping

Pass = Callable[[GraphModule], GraphModule]


@dataclass(frozen=True)
class Step:
    """A pass, and why it stands where it does."""

    name: str
    run: Pass
    reason: str


@dataclass(frozen=True)
class Pipeline:
    """Steps that run one after the other on a GraphModule, in place."""

    name: str
    steps: tuple[Step, ...]

    def run(self, graph_module: GraphModule) -> GraphModule:
        """Run every step; return the same GraphModule. Raises PTQError at another stage, and whatever steps raise."""
        for step in self.steps:
            step.run(graph_module)
        return graph_module

    def until(self, last: str) -> Pipeline:
        """Return the steps up to and with the one called `last`; raises PTQError, with near names, if there is none."""
        return replace(self, steps=self.steps[: self._position(last) + 1])

    def after(self, first: str) -> Pipeline:
        """Return the steps behind the one called `first`: what `until` left; raises PTQError if there is none."""
        return replace(self, steps=self.steps[self._position(first) + 1 :])

    def without(self, name: str) -> Pipeline:
        """Return the steps but the one called `name`; raises PTQError if there is none."""
        position = self._position(name)
        return replace(self, steps=(*self.steps[:position], *self.steps[position + 1 :]))

    def __str__(self) -> str:
        width = max((len(step.name) for step in self.steps), default=0)
        return "\n".join([f"{self.name}:", *(f"  {step.name:{width}}  {step.reason}" for step in self.steps)])

    def _position(self, name: str) -> int:
        names = [step.name for step in self.steps]
        if name not in names:
            do = f"near names: {near_names(name, names)}"
            raise failure(f"pipeline {self.name}", repr(name), expected="a step", got="none of that name", do=do)
        return names.index(name)


def _pipeline(name: str, *steps: tuple[Pass, str]) -> Pipeline:
    def named(run: Pass) -> str:
        return str(getattr(run.func if isinstance(run, partial) else run, "__name__", run))

    return Pipeline(name, tuple(Step(named(run), run, reason) for run, reason in steps))


#: Why `fold_batch_norms` stands where it does, if convolutions are balanced.
FOLDED = "behind folding, for it changes stored weights, and takes a computed one as it takes any other"
#: Why `rotate_residual` stands where it does, if the mapping asks for it.
ROTATED = "behind folding, for it changes stored weights; in front of the names, which it leaves as they are"


def preparation(mapping: QConfigMapping, closed: Sequence[str] = ()) -> Pipeline:
    """Return the passes from a traced graph to a prepared one.

    closed: paths of modules whose products stay float, whether the tracer went into them or not.
    """
    transforms = mapping.transforms
    rotated = [] if transforms.rotation is None else [(partial(rotate_residual, seed=transforms.rotation), ROTATED)]
    folded = [(fold_batch_norms, FOLDED)] if transforms.convolutions or transforms.depthwise else []
    balanced = any(getattr(transforms, name) for name in EXPONENTS)
    return _pipeline(
        "prepare",
        (from_aten, "first, so that nothing behind it asks which tracer made the graph"),
        (remove_identities, "an identity between two calls would hide a pattern"),
        (open_einsum, "a product inside of an einsum must be seen; needs shapes, which einsum's labels stand for"),
        (open_vector_products, "a product has rows and columns from here on; needs shapes, which tell a vector"),
        (open_embeddings, "sums and maxima have forms that ONNX has; needs shapes, which tell bags of one length"),
        (
            decompose_attention,
            "softmax and both products of attention must be seen; its calls are spelled later",
        ),
        (canonicalize, "behind all that writes calls: from here on there is one spelling of each"),
        (replace_in_place, "behind the one spelling, whose `inplace` it looks for; calibration keeps operands"),
        (slice_pieces, "behind what makes writes pure: pieces that nobody writes into any more stay as they are"),
        (multiply_in_float32, "in front of folding, which then stores weights as the float32 that they are read as"),
        (fold_constants, "a computed weight is an attribute for the plan; nothing may write into it any more"),
        *folded,
        *rotated,
        (partial(annotate, mapping=mapping, closed=closed), "products have their final form, so they get their names"),
        *([(find_balances, "behind the plan, whose products' weights take balances back")] if balanced else []),
        (insert_observers, "one behind each product that was planned"),
    )


#: From a prepared graph with a calibration to the one that is deployed.
CONVERSION = _pipeline(
    "convert",
    (apply_balances, "in front of the quantizers, whose scales stand on balanced channels"),
    (leave_float, "behind the balances, whose places the products that it forgets still show"),
    (insert_quantizers, "what calibration simulated: every operand quantized, every product in float"),
    (round_weights, "in front of whatever moves or folds weights: from here on codes are what rounding gives"),
    (narrow_tokens, "while an operation is one node: behind lowering it would have to follow branches"),
    (lower_patch_convolution, "in front of folding, which then stores the kernel as the matrix that it is"),
    (fold_weights, "in front of the activations, whose lowering asks which operands are weights already"),
    (lower_activations, "from modules to codes: twins become two branches, scales per head leave the product"),
    (fold_head_scales, "behind what wrote the divisions, in front of what transposes the weights that take them"),
    (lower_linears, "one kind of product for the next pass; weights in the layout that runtimes fuse"),
    (lower_products, "last: everything else matches on dequantized operands"),
)


def timings(graph_module: GraphModule) -> str:
    """Return a table of every pass that ran on a graph: rewrites and milliseconds."""
    rows = [f"{'pass':28}{'rewrites':>9}{'ms':>9}"]
    rows += [f"{rewrite.name:28}{rewrite.count:9}{1e3 * rewrite.seconds:9.1f}" for rewrite in history(graph_module)]
    return "\n".join(rows)
